//! `olol proxy`: one address for many servers.

use clap::{ArgMatches, Args};

use super::flags::Flags;
use super::{Hangups, Stop};
use crate::proxy::Proxy;

/// Run the proxy.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
}

impl Arguments {
    pub(super) fn run(self, matches: &ArgMatches) -> anyhow::Result<()> {
        let source = self.flags.source(matches)?;
        let config = source.read()?.config;
        super::runtime(config.worker_threads())?.block_on(async {
            let (mut stop, mut hangups) = (Stop::listen()?, Hangups::listen()?);
            let Some(proxy) = stop.unless_asked(Proxy::start_from(&config, Some(source))).await else { return Ok(()) };
            let proxy = proxy?;
            tracing::info!(address = %proxy.address(), servers = config.proxy.servers.join(","), "the proxy listens");
            let _ = stop.unless_asked(hangups.reload(&proxy)).await;
            match stop.gently(proxy.stop()).await {
                Some(true) => {}
                Some(false) => {
                    let after_s = config.limits.grace_s.get();
                    tracing::warn!(after_s, "answers that did not end in time were cut");
                }
                None => tracing::warn!("asked once more: what was still being answered is cut"),
            }
            Ok(())
        })
    }
}
