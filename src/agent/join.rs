//! Dials proxies that cannot dial this agent, and serves them over the connections that it has made.
//!
//! One connection more than is in use is always open: as soon as the proxy begins to use one, the next is made. A proxy that
//! does not answer is dialled again and again, ever less often up to a few seconds.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use olol_middleware::BoxError;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;

use super::door::Door;
use super::{Grpc, INTRODUCTION, Visit};
use crate::discovery::join::{INSTANCE, NAME, PATH, PROTOCOL};
use crate::ollama::Endpoint;
use crate::security::proof::Purpose;
use crate::security::tls::{self, Connector};
use crate::serve::{self, Peer};

/// Port of a proxy when none is given.
const PROXY_PORT: u16 = 8000;
/// The longest that dialling may take.
const DIALLING: Duration = Duration::from_secs(5);
/// The shortest pause before a proxy is dialled again, and the longest: one that comes back is found within 3 seconds.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(2500));
/// The pause where a proxy has too many to take in at this moment: its turn comes soon, and it is never far away.
const SHORT_PAUSE: Duration = Duration::from_millis(200);
/// The pause where only a person can mend what is wrong, or nothing has to be done.
const LONG_PAUSE: Duration = Duration::from_secs(10);
/// Silence after which a proxy is probed, and after which a probe counts as lost.
const PROBE: Duration = Duration::from_secs(3);
/// The longest answer of a proxy that refuses us, bytes.
const LONGEST_ANSWER: usize = 4096;

/// A proxy to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyAddress {
    is_tls: bool,
    host: String,
    port: u16,
}

impl FromStr for ProxyAddress {
    type Err = String;

    /// Reads `http://HOST:PORT`, `https://HOST:PORT` or `HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (is_tls, rest) = match text.trim().split_once("://") {
            None => (false, text.trim()),
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some(_) => return Err(format!("'{text}' is no address of a proxy: say http://HOST:PORT")),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        match Endpoint::parse(rest, PROXY_PORT) {
            Ok(Endpoint::Tcp { host, port }) if !rest.contains('/') => Ok(Self { is_tls, host, port }),
            _ => Err(format!("'{text}' is no address of a proxy: say http://HOST:PORT")),
        }
    }
}

impl fmt::Display for ProxyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_tls { "https://" } else { "http://" })?;
        f.write_str(&self.authority())
    }
}

impl ProxyAddress {
    /// Whether it is dialled over TLS.
    pub fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// Whether what is said may be read on a network: it is elsewhere, and dialled without TLS.
    pub(super) fn is_open_to_others(&self) -> bool {
        let is_here = self.host == "localhost" || self.host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
        !self.is_tls && !is_here
    }

    fn authority(&self) -> String {
        Endpoint::Tcp { host: self.host.clone(), port: self.port }.to_string()
    }
}

/// Who dials.
pub(super) struct Joining {
    pub(super) grpc: Grpc,
    /// The name that it gives itself.
    pub(super) name: HeaderValue,
    pub(super) instance: HeaderValue,
    pub(super) tls: Option<Connector>,
    pub(super) stop: CancellationToken,
}

/// Why a proxy was not reached.
enum Failure {
    /// It may be otherwise in a moment.
    Now(BoxError),
    /// It takes in others first.
    Busy(BoxError),
    /// It stays so for a while.
    Lasting(BoxError),
}

impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Now(error.into())
    }
}

/// How a connection that waited has ended to wait.
enum Turn {
    /// The agent stops.
    Stop,
    /// The proxy uses it.
    Used,
    /// It is closed.
    Closed,
    /// It is closed, since one of us does not know the token.
    Refused,
}

impl Joining {
    /// Keeps connections to one proxy until the agent stops, and lets finish then what runs on them.
    pub(super) async fn keep(self: Arc<Self>, proxy: ProxyAddress) {
        let mut open = JoinSet::new();
        let mut pause = PAUSES.0;
        // What stands in the log, so that it stands there once.
        let mut said = String::new();
        loop {
            while open.try_join_next().is_some() {}
            let dialled = tokio::select! {
                () = self.stop.cancelled() => break,
                dialled = tokio::time::timeout(DIALLING, self.dial(&proxy)) => dialled,
            };
            let failure = match dialled {
                Err(_) => Failure::Now(format!("no answer within {} s", DIALLING.as_secs()).into()),
                Ok(Err(failure)) => failure,
                Ok(Ok((upgraded, peer))) => match self.serve(upgraded, peer, &mut open).await {
                    Turn::Stop => break,
                    Turn::Used => {
                        if said != "in" {
                            "in".clone_into(&mut said);
                            tracing::info!(%proxy, "joined a proxy, which calls over our connection");
                        }
                        pause = PAUSES.0;
                        // Were connections used up as fast as they are made, this bounds it.
                        self.rests(PAUSES.0 / 4).await;
                        continue;
                    }
                    Turn::Closed => Failure::Now("it has closed a connection".into()),
                    Turn::Refused => Failure::Lasting(
                        "it has not proved that it knows the token of the cluster, or has not believed us; give both the same: \
                         `olol token` prints it, and OLOL_TOKEN or --token-file give it to the other"
                            .into(),
                    ),
                },
            };
            let (error, next) = match failure {
                // Many begin together, and each has its turn soon: nobody waits ever longer for that.
                Failure::Busy(error) => {
                    tracing::debug!(%proxy, error, "a proxy takes in others first");
                    self.rests(SHORT_PAUSE.mul_f64(0.5 + fastrand::f64())).await;
                    continue;
                }
                Failure::Now(error) => (error, pause),
                Failure::Lasting(error) => (error, LONG_PAUSE),
            };
            let error = error.to_string();
            if error != said {
                tracing::warn!(%proxy, error, "a proxy cannot be joined now, and is dialled again");
                said = error;
            }
            self.rests(next.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(PAUSES.1);
        }
        while open.join_next().await.is_some() {}
    }

    async fn rests(&self, pause: Duration) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    /// Asks a proxy to turn a connection round.
    async fn dial(&self, proxy: &ProxyAddress) -> Result<(Upgraded, Peer), Failure> {
        let stream = TcpStream::connect((proxy.host.as_str(), proxy.port)).await?;
        stream.set_nodelay(true)?;
        let (address, here) = (stream.peer_addr()?, stream.local_addr().ok());
        let stream = match &self.tls {
            _ if !proxy.is_tls => Either::Left(stream),
            Some(tls) => Either::Right(tls.connect(&proxy.host, stream).await?),
            None => return Err(Failure::Lasting("https:// needs the CA of the cluster: --tls-ca".into())),
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends when the connection is turned round, or with the sender.
        tokio::spawn(connection.with_upgrades());
        let request = Request::post(PATH)
            .header(header::HOST, proxy.authority())
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, PROTOCOL)
            .header(NAME, self.name.clone())
            .header(INSTANCE, self.instance.clone())
            .body(Empty::<Bytes>::new())?;
        let failed = |error: hyper::Error| tls::told(error.to_string(), std::error::Error::source(&error));
        let answer = sender.send_request(request).await.map_err(failed)?;
        let status = answer.status();
        if status == StatusCode::SWITCHING_PROTOCOLS {
            let peer = Peer { address, here, is_machine: proxy.is_tls, is_known: Arc::default() };
            return Ok((hyper::upgrade::on(answer).await?, peer));
        }
        let body = Limited::new(answer.into_body(), LONGEST_ANSWER).collect().await;
        let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).trim().to_owned()).unwrap_or_default();
        let hint = if !proxy.is_tls && text.contains("HTTPS server") { "; say https://" } else { "" };
        let error = format!("it answers {status}: {text}{hint}").into();
        Err(match status {
            StatusCode::TOO_MANY_REQUESTS => Failure::Busy(error),
            _ => Failure::Lasting(error),
        })
    }

    /// Serves a connection, and returns when it no longer waits to be used; it goes on all the same.
    async fn serve(&self, upgraded: Upgraded, peer: Peer, open: &mut JoinSet<()>) -> Turn {
        let is_known = peer.is_known.clone();
        let door = Arc::new(Door::new(self.grpc.keeper.clone(), peer, Purpose::Join));
        let visit = Visit { inner: self.grpc.inner.clone(), door: door.clone(), tells: self.grpc.tells.clone() };
        let stop = self.stop.clone();
        let (ends, ended) = tokio::sync::oneshot::channel::<()>();
        let known = is_known.clone();
        open.spawn(async move {
            let serving = serve::serve_dialled(upgraded, visit, PROBE, &stop);
            let served = tokio::select! {
                served = serving => served.map_err(|error| error.to_string()),
                () = serve::stays_unknown(INTRODUCTION, &known) => Err("it has proved nothing in time".to_owned()),
            };
            if let Err(error) = served {
                tracing::debug!(error, "a connection to a proxy ended early");
            }
            drop(ends);
        });
        tokio::select! {
            () = self.stop.cancelled() => Turn::Stop,
            () = door.enters.notified() => Turn::Used,
            _ = ended => if door.is_refused() { Turn::Refused } else { Turn::Closed },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_proxies_are_read() {
        for (text, shown) in [
            ("http://proxy:8000", "http://proxy:8000"),
            ("https://proxy/", "https://proxy:8000"),
            (" 10.0.0.1:80 ", "http://10.0.0.1:80"),
            ("[::1]", "http://[::1]:8000"),
        ] {
            assert_eq!(text.parse::<ProxyAddress>().unwrap().to_string(), shown);
        }
        for text in ["", "ftp://proxy", "http://proxy/api", "proxy:x", "unix:///tmp/x"] {
            assert!(text.parse::<ProxyAddress>().is_err(), "{text}");
        }
    }
}
