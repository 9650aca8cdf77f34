//! A CA of a cluster, and certificates of it.

#![allow(clippy::unnecessary_debug_formatting, reason = "TOML quotes paths as Rust does")]

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use olol::agent::Options;
use olol::security::certs::{self, Order};
use olol::security::tls::{Acceptor, Clients, Config, Connector};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use tempfile::TempDir;

/// A CA, and certificates of it.
#[derive(Debug)]
pub struct Ca(TempDir);

impl Ca {
    /// A new one.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        certs::init(folder.path(), 10).unwrap();
        Self(folder)
    }

    /// With the certificate of a machine on loopback.
    pub fn with(name: &str) -> Self {
        let ca = Self::new();
        ca.issue(name, &["127.0.0.1"], false);
        ca
    }

    /// Makes a certificate.
    pub fn issue(&self, name: &str, hosts: &[&str], is_client: bool) {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        certs::issue(self.0.path(), &Order { name: name.to_owned(), hosts, is_client, days: 5 }).unwrap();
    }

    /// A certificate for a machine on loopback that has ended.
    pub fn issue_ended(&self, name: &str) {
        self.issue_with(name, |params| params.not_after = (SystemTime::now() - Duration::from_secs(60)).into());
    }

    /// A certificate for a machine on loopback that has not begun, as one looks where a clock is behind.
    pub fn issue_early(&self, name: &str) {
        self.issue_with(name, |params| params.not_before = (SystemTime::now() + Duration::from_secs(3600)).into());
    }

    fn issue_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) {
        let ca_key = KeyPair::from_pem(&std::fs::read_to_string(self.file("ca.key")).unwrap()).unwrap();
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let made = params.signed_by(&key, &Issuer::new(certs::authority(&ca_key), ca_key)).unwrap();
        std::fs::write(self.file(&format!("{name}.pem")), made.pem()).unwrap();
        std::fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    /// One of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What an agent with this certificate is told.
    pub fn of(&self, name: &str, clients: Clients) -> Config {
        Config {
            cert: self.file(&format!("{name}.pem")),
            key: self.file(&format!("{name}.key")),
            ca: if clients == Clients::None { PathBuf::new() } else { self.file("ca.pem") },
            clients,
            ..Config::default()
        }
    }

    /// The lines of a proxy's configuration that name the CA.
    pub fn toml(&self) -> String {
        format!("[tls]\nca = {:?}\n", self.file("ca.pem"))
    }

    /// The same with a certificate that agents are shown.
    pub fn showing(&self, name: &str) -> String {
        let (cert, key) = (self.file(&format!("{name}.pem")), self.file(&format!("{name}.key")));
        format!("{}client-cert = {cert:?}\nclient-key = {key:?}\n", self.toml())
    }

    /// The lines that name the certificate which clients are shown.
    pub fn front(&self, name: &str) -> String {
        let (cert, key) = (self.file(&format!("{name}.pem")), self.file(&format!("{name}.key")));
        format!("[tls]\ncert = {cert:?}\nkey = {key:?}\n")
    }

    /// What an agent with this certificate is told besides the rest: callers are met with TLS, and others are called so.
    pub fn dress(&self, name: &str, clients: Clients, options: Options) -> Options {
        let (accepts, calls) = (self.of(name, clients), self.of(name, Clients::Optional));
        Options {
            tls: Acceptor::start(&accepts).unwrap(),
            join_tls: Connector::to_proxies(&calls).unwrap(),
            connector: Connector::start(&calls).unwrap(),
            ..options
        }
    }
}
