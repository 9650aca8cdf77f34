//! Where an Ollama keeps its models, if that is on this machine.

use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};

use crate::discovery::networks;
use crate::ollama::{Endpoint, Ollama};

/// The folder of an Ollama's models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Folder {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Whether the Ollama itself said so.
    pub(super) is_certain: bool,
}

/// The folder of an Ollama's models: as it names it for one of them, or else where it would be.
pub(super) async fn of(ollama: &Ollama, model: Option<&str>) -> Option<Folder> {
    let endpoint = ollama.endpoint().clone();
    let is_here = tokio::task::spawn_blocking(move || is_this_machine(&endpoint)).await.unwrap_or(false);
    if !is_here {
        return None;
    }
    if let Some(model) = model
        && let Some(blobs) = ollama.folder(model).await
    {
        // What is in a container has another idea of where things are.
        return holds_manifests(blobs.parent()?).map(|path| Folder { path, is_certain: true });
    }
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".ollama/models"));
    let said = std::env::var_os("OLLAMA_MODELS").filter(|path| !path.is_empty()).map(PathBuf::from);
    let usual = PathBuf::from("/usr/share/ollama/.ollama/models");
    let places = said.into_iter().chain(home).chain([usual]);
    places.into_iter().find_map(|path| holds_manifests(&path)).map(|path| Folder { path, is_certain: false })
}

fn holds_manifests(folder: &Path) -> Option<PathBuf> {
    folder.join("manifests").is_dir().then(|| folder.to_owned())
}

/// Whether an address is one of this machine.
fn is_this_machine(endpoint: &Endpoint) -> bool {
    let (host, port) = match endpoint {
        Endpoint::Unix(_) => return true,
        Endpoint::Tcp { host, port } | Endpoint::Tls { host, port } => (host, *port),
    };
    let Ok(mut addresses) = (host.as_str(), port).to_socket_addrs() else { return false };
    let own = networks::addresses();
    addresses.any(|address| {
        let ip = address.ip();
        ip.is_loopback() || ip.is_unspecified() || own.contains(&ip)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_by_its_addresses() {
        for (host, wanted) in [("127.0.0.1", true), ("::1", true), ("localhost", true), ("192.0.2.1", false)] {
            let endpoint = Endpoint::Tcp { host: host.to_owned(), port: 1 };
            assert_eq!(is_this_machine(&endpoint), wanted, "{host}");
        }
        assert!(is_this_machine(&Endpoint::Unix("/tmp/x".into())));
    }
}
