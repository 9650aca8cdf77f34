//! The configuration of a proxy: a file, then the environment, then flags.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use olol_middleware::stack;
use serde::Deserialize;

use crate::{pool, scatter};

/// The `[limits]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Bytes of request bodies that are held for all requests together. What is beyond is streamed, and tried once.
    pub body_memory: u64,
    /// Seconds between two pieces of a request body after which its sender counts as gone.
    pub body_pause_s: u64,
    /// Seconds that running answers may take after a stop was asked for.
    pub grace_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { body_memory: 1 << 30, body_pause_s: 60, grace_s: 30 }
    }
}

/// The `[proxy]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Proxy {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 takes any.
    pub port: u16,
    /// The servers, each as in `--servers`.
    pub servers: Vec<String>,
    /// Worker threads; 0: one a processor.
    pub threads: usize,
    /// Further origins that may ask from a browser, as in `OLLAMA_ORIGINS`.
    pub origins: Vec<String>,
}

impl Default for Proxy {
    fn default() -> Self {
        Self { host: "127.0.0.1".to_owned(), port: 8000, servers: Vec::new(), threads: 0, origins: Vec::new() }
    }
}

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Worker threads; 0: one a processor. Stands before the tables.
    pub threads: usize,
    /// Where to listen, and the servers.
    pub proxy: Proxy,
    /// Limits of every request.
    pub limits: Limits,
    /// How servers are reached and checked.
    pub pool: pool::Config,
    /// Where blobs wait.
    pub spool: scatter::Config,
    /// Which layers are on.
    pub stack: stack::Table,
    /// The `trace` layer.
    pub trace: olol_middleware::trace::Config,
    /// The `metrics` layer.
    pub metrics: olol_middleware::metrics::Config,
    /// The `model-route` layer.
    pub model_route: olol_middleware::model_route::Config,
    /// The `affinity` layer.
    pub affinity: olol_middleware::affinity::Config,
    /// The `retry` layer.
    pub retry: olol_middleware::retry::Config,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be: place and reason.
    #[error("{path}: {message}", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and what is wrong.
        message: String,
    },
    /// The values do not fit together.
    #[error("{0}")]
    Invalid(String),
}

impl Config {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        config.validate()?;
        Ok(config)
    }

    /// Checks what spans several tables.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.servers()?;
        self.address()?;
        Ok(())
    }

    /// Address to listen on.
    pub fn address(&self) -> Result<SocketAddr, ConfigError> {
        listen_address(&self.proxy.host, self.proxy.port).map_err(ConfigError::Invalid)
    }

    /// The servers.
    pub fn servers(&self) -> Result<Vec<pool::ServerSpec>, ConfigError> {
        let list = self.proxy.servers.join(",");
        pool::ServerSpec::parse_list(&list).map_err(|error| ConfigError::Invalid(format!("servers: {error}")))
    }

    /// Worker threads; 0: one a processor.
    pub fn worker_threads(&self) -> usize {
        self.threads.max(self.proxy.threads)
    }

    /// The tables of the layers.
    pub fn layers(&self) -> stack::Config {
        stack::Config {
            stack: self.stack.clone(),
            trace: self.trace.clone(),
            metrics: self.metrics.clone(),
            model_route: self.model_route.clone(),
            affinity: self.affinity.clone(),
            retry: self.retry.clone(),
        }
    }
}

/// A host as given to `--host`, with a port: an address, `localhost`, or a name that resolves.
pub fn listen_address(host: &str, port: u16) -> Result<SocketAddr, String> {
    use std::net::ToSocketAddrs;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut addresses =
        (bare, port).to_socket_addrs().map_err(|error| format!("cannot listen on '{host}': {error}"))?;
    addresses.next().ok_or_else(|| format!("cannot listen on '{host}': it has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::read(file.path()).unwrap_err().to_string()
    }

    #[test]
    fn the_documented_file_holds_every_default() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/olol.toml");
        assert_eq!(Config::read(&path).unwrap(), Config::default());
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        assert!(error("[proxy]\nprot = 1").contains("line 2") && error("[proxy]\nprot = 1").contains("`prot`"));
        assert!(error("[proxy]\nport = \"x\"").contains("line 2"));
        assert!(error("[proxy]\nservers = [\"a:b\"]").contains("'b' is no port"));
        assert!(error("[stack]\norder = [\"retry\", \"model-route\"]").contains("must come first"));
    }
}
