//! TLS: between clients and the proxy, between the proxy and its agents, and towards Ollamas at `https://`. Certificates are
//! read again when their files change; connections that are open keep theirs.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use olol_middleware::{Pattern, ServerId, instruments};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_util::either::Either;

use super::{Seldom, meant_for};
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
/// What an agent tells such a client: whoever looks for agents knows by it that there is one.
const PLAIN_AGENT: &[u8] =
    b"HTTP/1.0 400 Bad Request\r\nolol-agent: tls=yes\r\n\r\nthis is an OLOL agent: it speaks gRPC over TLS\n";
/// What one is told that speaks HTTP/2: no settings, and a GOAWAY for want of security, whose words the other end shows.
const PLAIN_HTTP2: &[u8] = b"\0\0\0\x04\0\0\0\0\0\
    \0\0\x37\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0cthis port speaks TLS, and was called without it";
/// How a handshake begins.
const HANDSHAKE_RECORD: u8 = 0x16;
/// How HTTP/2 begins.
const HTTP2: &[u8] = b"PRI";
/// The longest that closing waits for a client that still speaks: it would be reset before it has read its answer.
const LINGER: Duration = Duration::from_millis(500);

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
    /// Files with the CAs of Ollamas at `https://`, by the names of the servers; of others those count that the system trusts.
    pub server_ca: BTreeMap<Pattern, PathBuf>,
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
    /// There can be no TLS at all.
    #[error("no TLS: {0}")]
    None(String),
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
        self.server_ca.values().try_for_each(|file| roots(file).map(drop))
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
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let roots = roots(&self.ca)?;
        if is_given(&self.client_cert)
            && let Some((leaf, between)) = chain(cert)?.split_first()
        {
            warn_of_end(leaf, between, &roots, cert);
        }
        let builder = builder.map_err(pair)?.with_root_certificates(roots);
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

/// Those that the system trusts, or that `SSL_CERT_FILE` and `SSL_CERT_DIR` name.
fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "some CAs that the system trusts cannot be read");
    }
    let mut all = RootCertStore::empty();
    all.add_parsable_certificates(found.certs);
    if all.is_empty() {
        tracing::warn!("this system names no CA that it trusts: no certificate will be taken; install ca-certificates");
    }
    all
}

/// A client that shows no certificate.
fn anonymous(roots: RootCertStore) -> Result<ClientSide, rustls::Error> {
    let mut config = nameless(roots)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(ClientSide { config: Arc::new(config) })
}

/// The same for who speaks nothing that has a name.
fn without_protocols(roots: RootCertStore) -> Result<ClientSide, rustls::Error> {
    Ok(ClientSide { config: Arc::new(nameless(roots)?) })
}

fn nameless(roots: RootCertStore) -> Result<ClientConfig, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
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
    /// Why the files of now are not in use.
    fault: Arc<ArcSwapOption<TlsError>>,
    // Ends with this.
    _following: JoinSet<()>,
}

impl<T: Send + Sync + 'static> Live<T> {
    /// One of these files; there is at least one.
    fn start(
        files: &[PathBuf],
        read: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        // Watched before they are read: no change is missed.
        let changes: Vec<_> = files.iter().map(|file| watch(file)).collect();
        let Self { current, fault, .. } = Self::fixed(read()?);
        let mut following = JoinSet::new();
        following.spawn(follow(changes, current.clone(), fault.clone(), Arc::new(read)));
        Ok(Self { current, fault, _following: following })
    }

    /// One that stays as it is.
    fn fixed(made: T) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(made)), fault: Arc::default(), _following: JoinSet::new() }
    }

    fn fault(&self) -> Option<String> {
        self.fault.load().as_ref().map(ToString::to_string)
    }
}

async fn follow<T: Send + Sync + 'static>(
    mut changes: Vec<tokio::sync::watch::Receiver<()>>,
    current: Arc<ArcSwap<T>>,
    fault: Arc<ArcSwapOption<TlsError>>,
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
                fault.store(None);
                if is_told {
                    instruments::certificates_read(true);
                    tracing::info!("certificates were read again: new connections have the new ones");
                }
            }
            Ok(Err(error)) => {
                instruments::certificates_read(false);
                tracing::warn!(%error, "the certificates stay as they were");
                fault.store(Some(Arc::new(error)));
            }
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
pub struct Acceptor {
    live: Arc<Live<ServerSide>>,
    warned: Arc<Seldom>,
    /// Whether callers on this very machine may do without.
    spares_own: bool,
    /// What one is told that speaks plain HTTP.
    plain: &'static [u8],
}

/// A connection, without TLS or with it, from its server's side.
pub type Accepted = Either<TcpStream, Box<server::TlsStream<TcpStream>>>;

impl Acceptor {
    /// Meets HTTP and gRPC with the certificate of a configuration, if it has one, and follows its files.
    pub fn start(config: &Config) -> Result<Option<Self>, TlsError> {
        if !config.serves() {
            return Ok(None);
        }
        let (files, config) = (config.files(), config.clone());
        let live = Live::start(&files, move || config.server_side(&[b"h2", b"http/1.1"]))?;
        Ok(Some(Self { live: Arc::new(live), warned: Arc::default(), spares_own: false, plain: PLAIN }))
    }

    /// The same, but that callers on this very machine may do without TLS: their words leave it nowhere.
    #[must_use]
    pub fn sparing_own(self) -> Self {
        Self { spares_own: true, ..self }
    }

    /// The same for an agent.
    #[must_use]
    pub(crate) fn of_agent(self) -> Self {
        Self { plain: PLAIN_AGENT, ..self }
    }

    /// Why the files of now are not in use.
    pub fn fault(&self) -> Option<String> {
        self.live.fault()
    }

    /// Shakes hands with a caller, for so long; and whether it has shown the certificate of a machine of the cluster.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<(Accepted, bool)> {
        let client = stream.peer_addr();
        let shaken = tokio::time::timeout(HANDSHAKE, self.shake(stream)).await;
        let shaken =
            shaken.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long")));
        if let (Err(error), Ok(client)) = (&shaken, client)
            && error.kind() == io::ErrorKind::InvalidData
            && self.warned.may_speak()
        {
            // Not of those who come and say nothing: somebody may look whether the port is open.
            tracing::warn!(%client, reason = caller_fault(error), "a caller was refused");
        }
        shaken
    }

    async fn shake(&self, stream: TcpStream) -> io::Result<(Accepted, bool)> {
        let mut first = [0; HTTP2.len()];
        let length = stream.peek(&mut first).await?;
        let first = &first[..length];
        if first.first().is_some_and(|byte| *byte != HANDSHAKE_RECORD) {
            if self.spares_own && is_own(&stream) {
                return Ok((Either::Left(stream), false));
            }
            return Err(refuse_plain(stream, first, self.plain).await);
        }
        let side = self.live.current.load_full();
        let stream = match TlsAcceptor::from(side.config.clone()).accept(stream).into_fallible().await {
            Ok(stream) => stream,
            Err((error, mut stream)) => {
                // It was told why, and would be reset before it has read that.
                if error.kind() == io::ErrorKind::InvalidData {
                    hang_up(&mut stream).await;
                }
                return Err(error);
            }
        };
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::split_first);
        let is_machine =
            shown.is_some_and(|(leaf, between)| is_of_machine(leaf, between, &side.roots, UnixTime::now()).is_ok());
        Ok((Either::Right(Box::new(stream)), is_machine))
    }
}

/// Whether both ends of a connection are on this machine.
fn is_own(stream: &TcpStream) -> bool {
    let (Ok(client), Ok(here)) = (stream.peer_addr(), stream.local_addr()) else { return false };
    let client = client.ip().to_canonical();
    client.is_loopback() || client == here.ip().to_canonical()
}

/// Tells a client that speaks plain HTTP what it did wrong.
async fn refuse_plain(mut stream: TcpStream, first: &[u8], words: &'static [u8]) -> io::Error {
    use tokio::io::AsyncWriteExt;
    let words = if first == HTTP2 { PLAIN_HTTP2 } else { words };
    if first.iter().all(u8::is_ascii_uppercase) {
        let _ = stream.write_all(words).await;
        hang_up(&mut stream).await;
    }
    io::Error::new(io::ErrorKind::InvalidData, "the caller does not speak TLS")
}

/// Says no more, and waits a moment until the other has done so, too.
async fn hang_up(stream: &mut TcpStream) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let _ = stream.shutdown().await;
    let mut rest = [0; 1024];
    let ends = async { while stream.read(&mut rest).await.is_ok_and(|length| length > 0) {} };
    let _ = tokio::time::timeout(LINGER, ends).await;
}

/// What was wrong with a caller.
fn caller_fault(error: &io::Error) -> String {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext, UnknownIssuer};
    let hint = match inner(error) {
        Some(rustls::Error::NoCertificatesPresented) => "it shows no certificate, and must",
        Some(rustls::Error::InvalidCertificate(UnknownIssuer)) => "its certificate is not of our CA",
        Some(rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. })) => {
            "its certificate has ended, if the clock of this machine is right"
        }
        Some(rustls::Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. })) => {
            "its certificate has not begun: look at the clocks of both machines"
        }
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateExpired)) => {
            "by its clock our certificate has ended or not begun: look at the clocks of both machines"
        }
        Some(rustls::Error::AlertReceived(_)) => "it does not take our certificate",
        _ => return error.to_string(),
    };
    format!("{error}: {hint}")
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Acceptor")
    }
}

struct ClientSide {
    config: Arc<ClientConfig>,
}

/// Who is gone to over TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Agent,
    Proxy,
    Ollama,
    /// The Ollama of an agent, which has no list of CAs for it.
    Own,
    /// The proxy that a command asks.
    Command,
    /// What proxies share.
    Store,
}

/// Goes to agents, to proxies, or to Ollamas over TLS.
#[derive(Clone)]
pub struct Connector {
    live: Arc<Live<ClientSide>>,
    to: To,
}

impl Connector {
    /// Goes to agents whose certificates are of the CA of a configuration, if it has one, and follows its files.
    pub fn start(config: &Config) -> Result<Option<Self>, TlsError> {
        Self::speaking(config, &[b"h2"], To::Agent)
    }

    /// The same for an agent that dials a proxy, and turns the connection round.
    pub fn to_proxies(config: &Config) -> Result<Option<Self>, TlsError> {
        Self::speaking(config, &[b"http/1.1"], To::Proxy)
    }

    fn speaking(config: &Config, protocols: &'static [&'static [u8]], to: To) -> Result<Option<Self>, TlsError> {
        if !is_given(&config.ca) {
            return Ok(None);
        }
        let (files, config) = (config.files(), config.clone());
        Ok(Some(Self { live: Arc::new(Live::start(&files, move || config.client_side(protocols))?), to }))
    }

    /// Goes from an agent to its Ollama, whose certificate is of a CA that the system trusts.
    pub fn of_system() -> Result<Self, TlsError> {
        Self::trusting_system(To::Own)
    }

    fn trusting_system(to: To) -> Result<Self, TlsError> {
        let made = anonymous(system_roots()).map_err(|error| TlsError::None(error.to_string()))?;
        Ok(Self { live: Arc::new(Live::fixed(made)), to })
    }

    /// Goes to a proxy whose certificate is of a CA that the system trusts, or of one in this file, if there is such a file; and
    /// shows it this certificate with its key.
    pub fn of_command(more: Option<&Path>, own: Option<(&Path, &Path)>) -> Result<Self, TlsError> {
        let mut trusted = system_roots();
        if let Some(file) = more {
            trusted.add_parsable_certificates(chain(file)?);
        }
        let none = |error: rustls::Error| TlsError::None(error.to_string());
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(none)?.with_root_certificates(trusted);
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some((cert, its_key)) => {
                let pair = |error: rustls::Error| TlsError::Pair { path: cert.to_owned(), what: error.to_string() };
                builder.with_client_auth_cert(chain(cert)?, key(its_key)?).map_err(pair)?
            }
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { live: Arc::new(Live::fixed(ClientSide { config: Arc::new(config) })), to: To::Command })
    }

    /// Goes to a store whose certificate is of a CA in this file, which is followed, or of one that the system trusts.
    pub(crate) fn to_store(ca: Option<&Path>) -> Result<Self, TlsError> {
        let Some(ca) = ca.map(Path::to_owned) else {
            let made = without_protocols(system_roots()).map_err(|error| TlsError::None(error.to_string()))?;
            return Ok(Self { live: Arc::new(Live::fixed(made)), to: To::Store });
        };
        let file = ca.clone();
        let read = move || {
            let wrong = |error: rustls::Error| TlsError::File { path: file.clone(), what: error.to_string() };
            without_protocols(roots(&file)?).map_err(wrong)
        };
        Ok(Self { live: Arc::new(Live::start(&[ca], read)?), to: To::Store })
    }

    /// Goes to an Ollama whose certificate is of a CA in this file, which is followed.
    fn of_file(ca: &Path) -> Result<Self, TlsError> {
        let file = ca.to_owned();
        let read = move || {
            anonymous(roots(&file)?).map_err(|error| TlsError::File { path: file.clone(), what: error.to_string() })
        };
        Ok(Self { live: Arc::new(Live::start(&[ca.to_owned()], read)?), to: To::Ollama })
    }

    /// Why the files of now are not in use.
    pub fn fault(&self) -> Option<String> {
        self.live.fault()
    }

    /// Shakes hands with whoever has this name or address.
    pub async fn connect(&self, host: &str, stream: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        // A certificate knows nothing of our interfaces.
        let host = host.split('%').next().unwrap_or_default();
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "no certificate can be for this name"))?;
        let side = self.live.current.load_full();
        let shaken = TlsConnector::from(side.config.clone()).connect(name, stream).await;
        shaken.map_err(|error| {
            let hint = self.to.hint(&error, host).map(|hint| format!(": {hint}")).unwrap_or_default();
            io::Error::new(error.kind(), format!("TLS: {}{hint}", steady(&error)))
        })
    }
}

impl To {
    /// What to do about a handshake that failed.
    fn hint(self, error: &io::Error, host: &str) -> Option<String> {
        use CertificateError as Bad;
        let (it_has_none, other_ca, issue) = match self {
            Self::Agent => (
                "give the agent a certificate, or name it as grpc://HOST:PORT",
                "it must be of the CA in `ca` of [tls], or --tls-ca, a file that may hold several",
                "`olol certs issue` makes one",
            ),
            Self::Proxy => (
                "say http://, or give the proxy a certificate",
                "it must be of the CA in --tls-ca, a file that may hold several",
                "`olol certs issue` makes one",
            ),
            Self::Ollama => (
                "say http://",
                "name its CA in `server-ca` of [tls], or in SSL_CERT_FILE",
                "whoever runs it must have a new one",
            ),
            Self::Own => ("say http://", "name its CA in SSL_CERT_FILE", "whoever runs it must have a new one"),
            Self::Command => {
                ("say http://", "name its CA in --tls-ca, or in SSL_CERT_FILE", "`olol certs issue` makes one")
            }
            Self::Store => ("say redis://", "name its CA in `ca` of [state]", "whoever runs it must have a new one"),
        };
        Some(match inner(error)? {
            rustls::Error::InvalidMessage(_) => format!("who listens there speaks no TLS; {it_has_none}"),
            rustls::Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
                format!("its certificate is of a CA that is not trusted; {other_ca}")
            }
            rustls::Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
                format!("its certificate has ended, if the clock of this machine is right; {issue}")
            }
            rustls::Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
                "its certificate has not begun: look at the clocks of both machines".to_owned()
            }
            rustls::Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
                match self {
                    Self::Ollama | Self::Own | Self::Store => "name it as its certificate does".to_owned(),
                    _ => format!("name it as its certificate does, or issue one with --host {host}"),
                }
            }
            rustls::Error::InvalidCertificate(Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. }) => {
                "its certificate is one of a client; issue one without --client".to_owned()
            }
            rustls::Error::AlertReceived(alert) => of_alert(*alert)?.to_owned(),
            _ => return None,
        })
    }
}

/// What the other end has against us.
fn of_alert(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::CertificateRequired => {
            "it wants a certificate of the cluster's CA, and we show none; name ours in `client-cert` of [tls], or in --tls-cert"
        }
        AlertDescription::UnknownCA => "our certificate is not of its CA",
        AlertDescription::CertificateExpired => {
            "by its clock our certificate has ended or not begun: look at the clocks of both machines, and issue a new one if it \
             has ended"
        }
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => "it does not take our certificate",
        _ => return None,
    })
}

/// What a failed handshake says, without the time of day: who fails again in the same way says the same.
fn steady(error: &io::Error) -> String {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let bare = match inner(error) {
        Some(rustls::Error::InvalidCertificate(ExpiredContext { .. })) => Expired,
        Some(rustls::Error::InvalidCertificate(NotValidYetContext { .. })) => NotValidYet,
        _ => return error.to_string(),
    };
    rustls::Error::InvalidCertificate(bare).to_string()
}

/// What TLS says of a failed connection.
fn inner(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// What an error says, with all that it comes from, and with what to do where the other end does not take our certificate:
/// that is often known only when the first answer is waited for.
pub fn told(mut text: String, mut source: Option<&(dyn StdError + 'static)>) -> String {
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    let alerts = [
        AlertDescription::CertificateRequired,
        AlertDescription::UnknownCA,
        AlertDescription::CertificateExpired,
        AlertDescription::BadCertificate,
        AlertDescription::CertificateUnknown,
    ];
    let is_in = |alert: &AlertDescription| text.contains(&rustls::Error::AlertReceived(*alert).to_string());
    match alerts.into_iter().find(is_in).and_then(of_alert) {
        Some(hint) if !text.contains(hint) => format!("{text}: {hint}"),
        _ => text,
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("to", &self.to).finish_non_exhaustive()
    }
}

/// How Ollamas at `https://` are reached. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Web(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    /// By the CAs in files of their own.
    own: Vec<(Pattern, Connector)>,
    /// By those that the system trusts; read when the first is reached so.
    system: OnceLock<Option<Connector>>,
}

impl Web {
    /// Knows the CAs of a configuration, and follows their files.
    pub fn start(config: &Config) -> Result<Self, TlsError> {
        let own = |(server, file): (&Pattern, &PathBuf)| Ok((server.clone(), Connector::of_file(file)?));
        let own = config.server_ca.iter().map(own).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Known { own, system: OnceLock::new() })))
    }

    /// How the one of this name is reached.
    pub fn to(&self, server: &ServerId) -> Option<Connector> {
        if let Some(own) = meant_for(&self.0.own, server) {
            return Some(own.clone());
        }
        let system = || {
            let made = Connector::trusting_system(To::Ollama);
            made.inspect_err(|error| tracing::error!(%error, "no server at https:// can be reached")).ok()
        };
        self.0.system.get_or_init(system).clone()
    }

    /// Why files of now are not in use.
    pub fn fault(&self) -> Option<String> {
        self.0.own.iter().find_map(|(_, connector)| connector.fault())
    }
}

/// All of a proxy that is made of files with certificates.
#[derive(Clone, Debug, Default)]
pub struct InUse {
    /// What clients are met with.
    pub acceptor: Option<Acceptor>,
    /// How agents are reached.
    pub connector: Option<Connector>,
    /// How Ollamas are.
    pub web: Web,
}

impl InUse {
    /// Why files as they are now are not in use, and what was before is.
    pub fn faults(&self) -> Vec<String> {
        let acceptor = self.acceptor.as_ref().and_then(Acceptor::fault);
        let connector = self.connector.as_ref().and_then(Connector::fault);
        let mut all: Vec<String> = [acceptor, connector, self.web.fault()].into_iter().flatten().collect();
        all.dedup();
        all
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
