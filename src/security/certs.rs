//! Makes a CA for the cluster, and certificates of it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use sha2::{Digest, Sha256};

use super::tls;
use crate::files;

/// What our CAs are called, before what tells them apart. It must stay so: the certificates of a CA name it.
const CA_NAME: &str = "OLOL cluster CA";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long before now certificates begin: clocks differ, by hours where one shows the time of another zone.
const EARLIER: Duration = DAY;

/// A certificate to be made.
#[derive(Clone, Debug)]
pub struct Order {
    /// What its files are called, and who it is for.
    pub name: String,
    /// Names and addresses under which the machine is reached.
    pub hosts: Vec<String>,
    /// Whether it is for a client, and so makes no machine one of the cluster.
    pub is_client: bool,
    /// How long it holds, days.
    pub days: u32,
}

/// The files of a certificate and of its key.
#[derive(Clone, Debug)]
pub struct Made {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key, for its owner alone.
    pub key: PathBuf,
}

impl Made {
    fn at(folder: &Path, name: &str) -> Self {
        Self { cert: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) }
    }
}

/// The user's folder for certificates.
pub fn folder() -> Option<PathBuf> {
    crate::config::folder().map(|folder| folder.join("certs"))
}

/// Makes a CA.
pub fn init(folder: &Path, days: u32) -> anyhow::Result<Made> {
    let made = Made::at(folder, "ca");
    refuse_to_overwrite(&made)?;
    let key = KeyPair::generate()?;
    let mut params = authority(&key);
    lives_for(&mut params, days);
    write(&made, &key.serialize_pem(), &params.self_signed(&key)?.pem())?;
    Ok(made)
}

/// Makes a certificate of the CA in a folder.
pub fn issue(folder: &Path, order: &Order) -> anyhow::Result<Made> {
    check_name(&order.name)?;
    let made = Made::at(folder, &order.name);
    refuse_to_overwrite(&made)?;
    let ca = Made::at(folder, "ca");
    let text = std::fs::read_to_string(&ca.key).map_err(|error| match error.kind() {
        ErrorKind::NotFound => anyhow!("there is no CA in {}; `olol certs init` makes one", folder.display()),
        _ => anyhow!("the key of the CA, {}, cannot be read: {error}", ca.key.display()),
    })?;
    // The reader's own words could repeat some of the key.
    let ca_key = KeyPair::from_pem(&text).ok().with_context(|| format!("{} has no key in it", ca.key.display()))?;
    let issuer = Issuer::new(authority(&ca_key), ca_key);
    let key = KeyPair::generate()?;
    let mut params = params(order)?;
    lives_for(&mut params, order.days);
    write(&made, &key.serialize_pem(), &params.signed_by(&key, &issuer)?.pem())?;
    if let Err(error) = tls::verify(&made.cert, &ca.cert, order.is_client) {
        let _ = std::fs::remove_file(&made.cert).and_then(|()| std::fs::remove_file(&made.key));
        return Err(error).with_context(|| {
            format!("{} and {} do not belong together, or the CA has ended", ca.cert.display(), ca.key.display())
        });
    }
    Ok(made)
}

/// The CA that has this key. It is called after it: who knows two CAs must not take one for the other.
pub fn authority(key: &KeyPair) -> CertificateParams {
    let digest = Sha256::digest(key.public_key_raw());
    let id = u64::from_be_bytes(std::array::from_fn(|at| digest[at]));
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("{CA_NAME} {id:016x}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn params(order: &Order) -> anyhow::Result<CertificateParams> {
    let mut hosts = order.hosts.clone();
    if hosts.is_empty() && !order.is_client {
        hosts.push(order.name.clone());
    }
    for host in &hosts {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._*".contains(&byte);
        if host.parse::<std::net::IpAddr>().is_err() && (host.is_empty() || !host.bytes().all(is_name)) {
            bail!(
                "'{host}' is neither a name nor an address of a machine; without port and brackets: gpu1, 10.0.0.7, fd00::7"
            );
        }
    }
    let mut params = CertificateParams::new(hosts).context("a host cannot stand in a certificate")?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, order.name.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if !order.is_client {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn lives_for(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now();
    params.not_before = (now - EARLIER).into();
    params.not_after = (now + DAY * days).into();
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let is_good = (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !name.starts_with(['.', '-']);
    match name {
        "ca" => bail!("'ca' is the certificate of the CA itself; choose another name"),
        _ if is_good => Ok(()),
        _ => bail!("the name '{name}' must be 1 to 64 letters, digits, '-', '_' and '.', and names no folder"),
    }
}

fn refuse_to_overwrite(made: &Made) -> anyhow::Result<()> {
    match [&made.cert, &made.key].into_iter().find(|file| file.exists()) {
        Some(file) => bail!("there is a {} already; remove it, or name another folder with --dir", file.display()),
        None => Ok(()),
    }
}

/// Writes both files: the key first, so that there is no certificate without it.
fn write(made: &Made, key: &str, cert: &str) -> anyhow::Result<()> {
    for (path, text) in [(&made.key, key), (&made.cert, cert)] {
        let is_new = files::put(path, text).with_context(|| format!("{} cannot be written", path.display()))?;
        if !is_new {
            bail!("there is a {} since a moment ago: somebody else makes this certificate, too", path.display());
        }
    }
    Ok(())
}
