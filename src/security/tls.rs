//! TLS: between clients and the proxy, and between the proxy and its agents. Certificates are read again when their files
//! change; connections that are open keep theirs.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::watch::watch;

/// The longest that a handshake may take.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// A certificate and its key are two files: what does not fit together is looked at once more after this time.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// A certificate that ends within this time is worth a warning.
const SOON: Duration = Duration::from_secs(14 * 24 * 60 * 60);
/// Certificates are looked at so often although nothing has changed: one may be about to end.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// What a client that speaks plain HTTP is told, in Go's words.
const PLAIN: &[u8] = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n";
/// How a handshake begins.
const HANDSHAKE_RECORD: u8 = 0x16;

/// The `[tls]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Certificate that clients are shown, with those between it and its CA; empty: no TLS for clients.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// CA of the cluster: agents must have a certificate of it, and so must clients, if they are asked for one.
    pub ca: PathBuf,
    /// Whether clients are asked for a certificate.
    pub clients: Clients,
    /// Certificate that agents are shown; empty: `cert`.
    pub client_cert: PathBuf,
    /// Its key; empty: `key`.
    pub client_key: PathBuf,
}

/// Whether clients are asked for a certificate of the cluster's CA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clients {
    /// No.
    #[default]
    None,
    /// Yes, and who has none may come all the same.
    Optional,
    /// Yes, and who has none may not come.
    Required,
}

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or has not in it what it should.
    #[error("{path}: {what}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// They do not fit together.
    #[error("{path}: the certificate and its key cannot be used: {what}", path = path.display())]
    Pair {
        /// The file of the certificate.
        path: PathBuf,
        /// Why.
        what: String,
    },
}

impl Config {
    /// Whether clients are met with TLS.
    pub fn serves(&self) -> bool {
        is_given(&self.cert)
    }

    /// What no type can hold: the key in question, and what is wrong with it.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        let pair = |cert: &Path, key: &Path, names: (&'static str, &'static str)| match (is_given(cert), is_given(key))
        {
            (true, false) => Err((names.1, "a certificate needs its key: name its file")),
            (false, true) => Err((names.0, "a key needs its certificate: name its file")),
            _ => Ok(()),
        };
        pair(&self.cert, &self.key, ("cert", "key"))?;
        pair(&self.client_cert, &self.client_key, ("client-cert", "client-key"))?;
        match (self.clients, is_given(&self.ca)) {
            (Clients::Optional | Clients::Required, false) => Err((
                "clients",
                "certificates of clients are checked against the CA of the cluster: name its file in `ca`",
            )),
            (Clients::Optional | Clients::Required, true) if !self.serves() => {
                Err(("clients", "clients show certificates over TLS alone: name `cert` and `key`"))
            }
            _ => Ok(()),
        }
    }

    /// Reads all that is named, and uses none of it.
    pub fn read(&self) -> Result<(), TlsError> {
        if self.serves() {
            self.server_side(&[])?;
        }
        if is_given(&self.ca) {
            self.client_side(&[])?;
        }
        Ok(())
    }

    fn files(&self) -> Vec<PathBuf> {
        let all = [&self.cert, &self.key, &self.ca, &self.client_cert, &self.client_key];
        all.into_iter().filter(|file| is_given(file)).cloned().collect()
    }

    fn server_side(&self, protocols: &[&[u8]]) -> Result<ServerSide, TlsError> {
        let pair = |error: rustls::Error| TlsError::Pair { path: self.cert.clone(), what: error.to_string() };
        let builder =
            ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(pair)?;
        let roots = Arc::new(if is_given(&self.ca) { roots(&self.ca)? } else { RootCertStore::empty() });
        let builder = match self.clients {
            Clients::None => builder.with_no_client_auth(),
            asked => builder.with_client_cert_verifier(verifier(&roots, asked, &self.ca)?),
        };
        let chain = chain(&self.cert)?;
        if let Some(leaf) = chain.first().filter(|_| !roots.is_empty()) {
            warn_of_end(leaf, &chain[1..], &roots, &self.cert);
        }
        let mut config = builder.with_single_cert(chain, key(&self.key)?).map_err(pair)?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(ServerSide { config: Arc::new(config), roots })
    }

    fn client_side(&self, protocols: &[&[u8]]) -> Result<ClientSide, TlsError> {
        let (cert, its_key) =
            if is_given(&self.client_cert) { (&self.client_cert, &self.client_key) } else { (&self.cert, &self.key) };
        let pair = |error: rustls::Error| TlsError::Pair { path: cert.clone(), what: error.to_string() };
        let builder =
            ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(pair)?;
        let builder = builder.with_root_certificates(roots(&self.ca)?);
        let mut config = if is_given(cert) {
            builder.with_client_auth_cert(chain(cert)?, key(its_key)?).map_err(pair)?
        } else {
            builder.with_no_client_auth()
        };
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(ClientSide { config: Arc::new(config) })
    }
}

fn is_given(file: &Path) -> bool {
    !file.as_os_str().is_empty()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |what: String| TlsError::File { path: path.to_owned(), what };
    let text = std::fs::read(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let chain = chain.map_err(|error| wrong(format!("is no PEM file: {error}")))?;
    if chain.is_empty() {
        return Err(wrong("has no certificate in it: it must be a PEM file with BEGIN CERTIFICATE".to_owned()));
    }
    Ok(chain)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let wrong = |what: String| TlsError::File { path: path.to_owned(), what };
    let text = std::fs::read(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        if std::fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o007 != 0) {
            tracing::warn!(file = %path.display(), "everybody on this machine may read this key: chmod 600 it");
        }
    }
    // Its own words could repeat some of the key.
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| {
        wrong("has no key in it: it must be a PEM file with BEGIN PRIVATE KEY, without a password".to_owned())
    })
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(path)? {
        let wrong = |error: rustls::Error| TlsError::File { path: path.to_owned(), what: error.to_string() };
        roots.add(certificate).map_err(wrong)?;
    }
    Ok(roots)
}

fn verifier(roots: &Arc<RootCertStore>, asked: Clients, ca: &Path) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let builder = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider());
    let builder = if asked == Clients::Optional { builder.allow_unauthenticated() } else { builder };
    builder.build().map_err(|error| TlsError::File { path: ca.to_owned(), what: error.to_string() })
}

/// Whether a certificate is that of a machine of the cluster at some time: it may serve, which those for clients may not.
fn is_of_machine(
    leaf: &CertificateDer<'_>,
    between: &[CertificateDer<'_>],
    roots: &RootCertStore,
    at: UnixTime,
) -> Result<(), rustls::Error> {
    let algorithms = provider().signature_verification_algorithms;
    verify_server_cert_signed_by_trust_anchor(&ParsedCertificate::try_from(leaf)?, roots, between, at, algorithms.all)
}

/// Whether a certificate in this file is of this CA, and good now: for a machine, or for a client.
pub(super) fn verify(cert: &Path, ca: &Path, is_client: bool) -> Result<(), TlsError> {
    let (chain, roots) = (chain(cert)?, Arc::new(roots(ca)?));
    let Some((leaf, between)) = chain.split_first() else { return Ok(()) };
    let verified = if is_client {
        verifier(&roots, Clients::Required, ca)?.verify_client_cert(leaf, between, UnixTime::now()).map(drop)
    } else {
        is_of_machine(leaf, between, &roots, UnixTime::now())
    };
    verified.map_err(|error| TlsError::Pair { path: cert.to_owned(), what: error.to_string() })
}

/// Says that a certificate of the cluster ends soon, or has ended.
fn warn_of_end(leaf: &CertificateDer<'_>, between: &[CertificateDer<'_>], roots: &RootCertStore, path: &Path) {
    let now = UnixTime::now();
    let soon = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + SOON);
    let ends = |at| {
        let verified = is_of_machine(leaf, between, roots, at);
        matches!(
            verified,
            Err(rustls::Error::InvalidCertificate(
                rustls::CertificateError::Expired | rustls::CertificateError::ExpiredContext { .. }
            ))
        )
    };
    if ends(now) {
        tracing::warn!(file = %path.display(), "this certificate has ended: nobody who checks it will come; issue a new one");
    } else if ends(soon) {
        tracing::warn!(file = %path.display(), "this certificate ends within 14 days: issue a new one");
    }
}

/// Something that is made of files, and made anew when one of them changes.
struct Live<T> {
    current: Arc<ArcSwap<T>>,
    // Ends with this.
    _following: JoinSet<()>,
}

impl<T: Send + Sync + 'static> Live<T> {
    fn start(
        files: &[PathBuf],
        read: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        // Watched before they are read: no change is missed.
        let changes: Vec<_> = files.iter().map(|file| watch(file)).collect();
        let current = Arc::new(ArcSwap::from_pointee(read()?));
        let mut following = JoinSet::new();
        following.spawn(follow(changes, current.clone(), Arc::new(read)));
        Ok(Self { current, _following: following })
    }
}

async fn follow<T: Send + Sync + 'static>(
    mut changes: Vec<tokio::sync::watch::Receiver<()>>,
    current: Arc<ArcSwap<T>>,
    read: Arc<impl Fn() -> Result<T, TlsError> + Send + Sync + 'static>,
) {
    loop {
        let any = changes.iter_mut().map(|change| Box::pin(change.changed()));
        let first = tokio::time::timeout(DAY, futures_util::future::select_all(any)).await;
        if matches!(first, Ok((Err(_), ..))) {
            return;
        }
        let is_told = first.is_ok();
        drop(first);
        let once = || {
            let read = read.clone();
            async move { tokio::task::spawn_blocking(move || read()).await }
        };
        let mut made = once().await;
        if matches!(made, Ok(Err(_))) {
            tokio::time::sleep(SECOND_LOOK).await;
            changes.iter_mut().for_each(tokio::sync::watch::Receiver::mark_unchanged);
            made = once().await;
        }
        match made {
            Ok(Ok(made)) => {
                current.store(Arc::new(made));
                if is_told {
                    tracing::info!("certificates were read again: new connections have the new ones");
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, "the certificates stay as they were"),
            Err(error) => tracing::error!(%error, "the certificates stay as they were"),
        }
    }
}

struct ServerSide {
    config: Arc<ServerConfig>,
    /// Those whose certificates make a machine one of the cluster.
    roots: Arc<RootCertStore>,
}

/// Meets callers with TLS.
#[derive(Clone)]
pub struct Acceptor(Arc<Live<ServerSide>>);

/// A connection over TLS, from its server's side.
pub type Accepted = server::TlsStream<TcpStream>;

impl Acceptor {
    /// Meets HTTP and gRPC with the certificate of a configuration, if it has one, and follows its files.
    pub fn start(config: &Config) -> Result<Option<Self>, TlsError> {
        if !config.serves() {
            return Ok(None);
        }
        let (files, config) = (config.files(), config.clone());
        let live = Live::start(&files, move || config.server_side(&[b"h2", b"http/1.1"]))?;
        Ok(Some(Self(Arc::new(live))))
    }

    /// Shakes hands with a caller, for so long; and whether it has shown the certificate of a machine of the cluster.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<(Accepted, bool)> {
        let shaking = async {
            let mut first = [0];
            if stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE_RECORD {
                return Err(refuse_plain(stream, first[0]).await);
            }
            let side = self.0.current.load_full();
            let stream = TlsAcceptor::from(side.config.clone()).accept(stream).await?;
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::split_first);
            let is_machine =
                shown.is_some_and(|(leaf, between)| is_of_machine(leaf, between, &side.roots, UnixTime::now()).is_ok());
            Ok((stream, is_machine))
        };
        let shaken = tokio::time::timeout(HANDSHAKE, shaking).await;
        shaken.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long")))
    }
}

/// Tells a client that speaks plain HTTP what it did wrong.
async fn refuse_plain(mut stream: TcpStream, first: u8) -> io::Error {
    use tokio::io::AsyncWriteExt;
    if first.is_ascii_uppercase() {
        let _ = stream.write_all(PLAIN).await;
        let _ = stream.shutdown().await;
    }
    io::Error::new(io::ErrorKind::InvalidData, "the caller does not speak TLS")
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Acceptor")
    }
}

struct ClientSide {
    config: Arc<ClientConfig>,
}

/// Goes to agents over TLS.
#[derive(Clone)]
pub struct Connector(Arc<Live<ClientSide>>);

impl Connector {
    /// Goes to agents whose certificates are of the CA of a configuration, if it has one, and follows its files.
    pub fn start(config: &Config) -> Result<Option<Self>, TlsError> {
        Self::speaking(config, &[b"h2"])
    }

    /// The same for an agent that dials a proxy, and turns the connection round.
    pub fn to_proxies(config: &Config) -> Result<Option<Self>, TlsError> {
        Self::speaking(config, &[b"http/1.1"])
    }

    fn speaking(config: &Config, protocols: &'static [&'static [u8]]) -> Result<Option<Self>, TlsError> {
        if !is_given(&config.ca) {
            return Ok(None);
        }
        let (files, config) = (config.files(), config.clone());
        Ok(Some(Self(Arc::new(Live::start(&files, move || config.client_side(protocols))?))))
    }

    /// Shakes hands with the agent of this name or address.
    pub async fn connect(&self, host: &str, stream: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        // A certificate knows nothing of our interfaces.
        let host = host.split('%').next().unwrap_or_default();
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "no certificate can be for this name"))?;
        let side = self.0.current.load_full();
        let shaken = TlsConnector::from(side.config.clone()).connect(name, stream).await;
        shaken.map_err(|error| io::Error::new(error.kind(), format!("TLS: {error}")))
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

#[cfg(test)]
mod tests {
    use super::super::certs::{self, Order};
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn who_does_not_shake_hands_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        certs::init(folder.path(), 1).unwrap();
        let order = Order { name: "a".to_owned(), hosts: Vec::new(), is_client: false, days: 1 };
        let made = certs::issue(folder.path(), &order).unwrap();
        let config = Config { cert: made.cert, key: made.key, ..Config::default() };
        let acceptor = Acceptor::start(&config).unwrap().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _silent = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        tokio::time::pause();
        let begun = tokio::time::Instant::now();
        let error = acceptor.accept(stream).await.map(drop).unwrap_err();
        assert_eq!((error.kind(), begun.elapsed().as_secs()), (io::ErrorKind::TimedOut, HANDSHAKE.as_secs()));
    }
}
