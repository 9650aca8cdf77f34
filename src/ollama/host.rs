//! `OLLAMA_HOST` as Ollama reads it (`envconfig.Host`).

use std::net::IpAddr;

use super::{Endpoint, EndpointError};

/// Port of Ollama.
const DEFAULT_PORT: u16 = 11434;

impl Endpoint {
    /// Reads `OLLAMA_HOST`: a host, an address, with or without scheme, port and path; empty is 127.0.0.1:11434.
    pub fn from_ollama_host(text: &str) -> Result<Self, EndpointError> {
        let text = text.trim().trim_matches(['"', '\'']).trim();
        let is_tls = text.starts_with("https://");
        let (port, rest) = match text.split_once("://") {
            None => (DEFAULT_PORT, text),
            Some(("http", rest)) => (80, rest),
            Some(("https", rest)) => (443, rest),
            Some((scheme, _)) => {
                return Err(EndpointError(format!(
                    "OLLAMA_HOST: '{scheme}' is not supported; servers are reached at http:// or https://"
                )));
            }
        };
        let hostport = rest.split_once('/').map_or(rest, |(hostport, _path)| hostport);
        let (host, port) = if let Some((host, given)) = split(hostport) {
            // A port that is none is replaced by the default, as Ollama does with a warning.
            (host, given.parse::<u16>().unwrap_or(port))
        } else {
            let bare = hostport.trim_matches(['[', ']']);
            (if bare.parse::<IpAddr>().is_ok() { bare } else { hostport }, port)
        };
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        let host = host.to_owned();
        Ok(if is_tls { Self::Tls { host, port } } else { Self::Tcp { host, port } })
    }
}

/// Host and port as Go's `SplitHostPort` splits them; `None` where it fails.
fn split(hostport: &str) -> Option<(&str, &str)> {
    if let Some(rest) = hostport.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return Some((host, rest.strip_prefix(':')?));
    }
    let (host, port) = hostport.rsplit_once(':')?;
    (!host.contains(':')).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_ollama_reads_it() {
        for (text, wanted) in [
            ("", "127.0.0.1:11434"),
            ("1.2.3.4", "1.2.3.4:11434"),
            (":1234", "127.0.0.1:1234"),
            ("1.2.3.4:56", "1.2.3.4:56"),
            ("example.com", "example.com:11434"),
            ("http://example.com", "example.com:80"),
            ("http://example.com:5/path", "example.com:5"),
            ("example.com:66000", "example.com:11434"),
            ("[::1]", "[::1]:11434"),
            ("[::1]:80", "[::1]:80"),
            ("::1", "[::1]:11434"),
            (" \"1.2.3.4\" ", "1.2.3.4:11434"),
            ("0.0.0.0", "0.0.0.0:11434"),
            ("https://example.com", "https://example.com:443"),
            ("https://example.com:8/path", "https://example.com:8"),
        ] {
            assert_eq!(Endpoint::from_ollama_host(text).unwrap().to_string(), wanted, "{text:?}");
        }
        assert!(Endpoint::from_ollama_host("ftp://example.com").is_err());
    }
}
