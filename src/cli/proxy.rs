//! `olol proxy`: one address for many servers.

use std::path::PathBuf;

use clap::Args;

use super::Stop;
use crate::config::Config;
use crate::proxy::Proxy;

/// Run the proxy.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Address to listen on; 0.0.0.0 serves other machines too [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Port to listen on; 0 takes any [default: 8000]
    #[arg(long, env = "OLOL_PORT")]
    port: Option<u16>,
    /// Servers: agents as HOST:PORT, bare Ollamas as http://HOST:PORT, each with =WEIGHT behind it and NAME@ before it if
    /// you like: gpu1:50051=2,attic@http://10.0.0.7:11434,[::1]:50051
    #[arg(long, env = "OLLAMA_SERVERS", value_name = "LIST")]
    servers: Option<String>,
    /// Configuration file (see config/olol.toml)
    #[arg(long, env = "OLOL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Worker threads; 0: one a processor [default: 0]
    #[arg(long)]
    threads: Option<usize>,
}

impl Arguments {
    pub(super) fn config(self) -> anyhow::Result<Config> {
        let mut config = self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)?;
        if let Some(host) = self.host {
            config.proxy.host = host;
        }
        if let Some(port) = self.port {
            config.proxy.port = port;
        }
        if let Some(servers) = self.servers {
            config.proxy.servers =
                servers.split(',').map(|server| server.trim().to_owned()).filter(|s| !s.is_empty()).collect();
        }
        if let Some(threads) = self.threads {
            config.threads = threads;
        }
        if config.proxy.servers.is_empty() {
            config.proxy.servers = vec!["localhost:50051".to_owned()];
        }
        config.validate()?;
        Ok(config)
    }

    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = self.config()?;
        super::runtime(config.worker_threads())?.block_on(async {
            let mut stop = Stop::listen()?;
            let Some(proxy) = stop.unless_asked(Proxy::start(&config)).await else { return Ok(()) };
            let proxy = proxy?;
            tracing::info!(address = %proxy.address(), servers = config.proxy.servers.join(","), "the proxy listens");
            stop.asked().await;
            match stop.gently(proxy.stop()).await {
                Some(true) => {}
                Some(false) => {
                    tracing::warn!(after_s = config.limits.grace_s, "answers that did not end in time were cut");
                }
                None => tracing::warn!("asked once more: what was still being answered is cut"),
            }
            Ok(())
        })
    }
}
