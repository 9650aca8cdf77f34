//! Who may ask: CORS and the check of the host, as Ollama's middleware does them (gin-contrib/cors 1.7.2, `routes.go`).

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Response, Uri};

use super::body::HttpBody;
use super::request::Facts;
use super::response;
use crate::discovery::networks;

const ALLOW_HEADERS: &str = "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout";
const ALLOW_METHODS: &str = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS";
/// Twelve hours, in seconds.
const MAX_AGE: &str = "43200";

/// The origins that may ask from a browser.
#[derive(Clone, Debug)]
pub struct Origins {
    any: bool,
    exact: Vec<String>,
    /// What stands before and behind a `*`.
    patterns: Vec<(String, String)>,
}

impl Origins {
    /// The origins of `OLLAMA_ORIGINS` (a list with commas, one `*` in each) and those that are always allowed.
    pub fn new(list: &str) -> Result<Self, String> {
        let mut origins: Vec<String> = list.split(',').map(str::to_owned).filter(|_| !list.is_empty()).collect();
        for host in ["localhost", "127.0.0.1", "0.0.0.0"] {
            for scheme in ["http", "https"] {
                origins.extend([format!("{scheme}://{host}"), format!("{scheme}://{host}:*")]);
            }
        }
        origins
            .extend(["app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*"].map(str::to_owned));
        if let Some(bad) = origins.iter().find(|origin| origin.matches('*').count() > 1) {
            return Err(format!("'{bad}' has more than one '*'"));
        }
        let pattern =
            |origin: &String| origin.split_once('*').map(|(before, behind)| (before.to_owned(), behind.to_owned()));
        Ok(Self {
            any: origins.iter().any(|origin| origin == "*"),
            patterns: origins.iter().filter_map(pattern).collect(),
            exact: origins.iter().map(|origin| origin.trim().to_lowercase()).collect(),
        })
    }

    fn allow(&self, origin: &str) -> bool {
        let fits = |(before, behind): &(String, String)| {
            origin.starts_with(before.as_str()) && origin.ends_with(behind.as_str())
        };
        self.any || self.exact.iter().any(|exact| exact == origin) || self.patterns.iter().any(fits)
    }
}

/// The checks before a route.
#[derive(Clone, Debug)]
pub struct Gate {
    origins: Arc<ArcSwap<Origins>>,
    /// Names and addresses of this machine, if the host is checked at all.
    here: Option<Here>,
}

#[derive(Clone, Debug)]
struct Here {
    name: String,
    addresses: Vec<IpAddr>,
}

/// What is allowed through, and what its answer must carry.
#[derive(Debug)]
pub(super) struct Pass(Option<HeaderValue>);

impl Gate {
    /// Checks origins always, and hosts if the server listens on a loopback address. The origins may be exchanged.
    pub fn new(origins: Arc<ArcSwap<Origins>>, listens_on: IpAddr) -> Self {
        let here = listens_on.is_loopback().then(|| Here {
            name: gethostname::gethostname().to_string_lossy().to_lowercase(),
            addresses: networks::addresses(),
        });
        Self { origins, here }
    }

    /// Lets a request pass, or answers it. `allow` is set when the route does not take the method.
    pub(super) fn check(
        &self,
        method: &Method,
        facts: &Facts<'_>,
        uri: &Uri,
        allow: Option<&'static str>,
    ) -> Result<Pass, Box<Response<HttpBody>>> {
        let named = uri.authority().map(|authority| authority.as_str().rsplit('@').next().unwrap_or_default());
        let host = named.or_else(|| text(facts.host?)).unwrap_or("");
        let origin = facts.origin.and_then(text).filter(|origin| !origin.is_empty());
        let foreign = origin.filter(|origin| !is_same(origin, host));
        let pass = match foreign {
            None => Pass(None),
            Some(origin) => {
                let origins = self.origins.load();
                if !origins.allow(origin) {
                    return Err(Box::new(response::forbidden(allow)));
                }
                let value = if origins.any { "*" } else { origin };
                let pass = Pass(HeaderValue::from_str(value).ok());
                if method == Method::OPTIONS {
                    return Err(Box::new(preflight(&pass, origins.any, allow)));
                }
                pass
            }
        };
        match &self.here {
            // The address that most clients on this machine use.
            Some(_) if host.strip_prefix("127.0.0.1:").is_some_and(|port| !port.as_bytes().contains(&b':')) => Ok(pass),
            Some(here) if !is_address_allowed(here, bare(host)) => {
                if !is_name_allowed(here, bare(host)) {
                    Err(Box::new(pass.marked(response::forbidden(allow))))
                } else if method == Method::OPTIONS {
                    Err(Box::new(pass.marked(response::no_content(allow))))
                } else {
                    Ok(pass)
                }
            }
            _ => Ok(pass),
        }
    }
}

impl Pass {
    /// An answer that tells a browser that it may read it.
    pub(super) fn marked(&self, mut answer: Response<HttpBody>) -> Response<HttpBody> {
        self.mark(answer.headers_mut());
        answer
    }

    /// The same, of an answer's headers.
    pub(super) fn mark(&self, headers: &mut HeaderMap) {
        if let Some(origin) = &self.0 {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            if origin != "*" {
                headers.insert(header::VARY, HeaderValue::from_static("Origin"));
            }
        }
    }
}

fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok()
}

fn preflight(pass: &Pass, any: bool, allow: Option<&'static str>) -> Response<HttpBody> {
    let mut answer = response::no_content(allow);
    let headers = answer.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(ALLOW_HEADERS));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(ALLOW_METHODS));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
    pass.mark(headers);
    if !any {
        headers.append(header::VARY, HeaderValue::from_static("Access-Control-Request-Method"));
        headers.append(header::VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
    }
    answer
}

/// Whether an origin is the very host that is asked.
fn is_same(origin: &str, host: &str) -> bool {
    origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")) == Some(host)
}

/// A host without its port, as Go's `SplitHostPort` takes it off, or as it is.
fn bare(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split_once("]:").map_or(host, |(host, _)| host);
    }
    match host.split_once(':') {
        Some((name, port)) if !port.as_bytes().contains(&b':') => name,
        _ => host,
    }
}

fn is_address_allowed(here: &Here, host: &str) -> bool {
    // Only addresses of IPv6 have the name of an interface behind them.
    let host = host.split_once('%').map_or(host, |(host, _)| if host.contains(':') { host } else { "" });
    let Ok(address) = host.parse::<IpAddr>() else { return false };
    let is_private = match address {
        IpAddr::V4(v4) => v4.is_private(),
        // fc00::/7
        IpAddr::V6(v6) => v6.segments()[0] & 0xfe00 == 0xfc00,
    };
    address.is_loopback() || is_private || address.is_unspecified() || here.addresses.contains(&address)
}

fn is_name_allowed(here: &Here, host: &str) -> bool {
    let host = host.to_lowercase();
    let is_local = [".localhost", ".local", ".internal"].iter().any(|ending| host.ends_with(ending));
    host.is_empty() || host == "localhost" || host == here.name || is_local
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn status(gate: &Gate, method: &Method, host: &str, origin: &str) -> u16 {
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_str(host).unwrap());
        if !origin.is_empty() {
            headers.insert("origin", HeaderValue::from_str(origin).unwrap());
        }
        gate.check(method, &Facts::of(&headers), &Uri::from_static("/api/tags"), None)
            .map_or_else(|answer| answer.status().as_u16(), |_| 200)
    }

    fn gate(origins: &str) -> Gate {
        Gate::new(Arc::new(ArcSwap::from_pointee(Origins::new(origins).unwrap())), IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    #[test]
    fn hosts_are_checked_on_loopback() {
        for (host, wanted) in [
            ("", 200),
            ("localhost:11434", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("10.1.2.3:5", 200),
            ("host.docker.internal:1", 200),
            ("a.local", 200),
            ("example.com", 403),
            ("8.8.8.8", 403),
            ("[fe80::1%eth0]", 403),
            ("[::1%lo]:1", 200),
            ("127.0.0.1%evil.example", 403),
            ("localhost.example.com", 403),
        ] {
            assert_eq!(status(&gate(""), &Method::GET, host, ""), wanted, "{host}");
        }
        let open =
            Gate::new(Arc::new(ArcSwap::from_pointee(Origins::new("").unwrap())), IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        assert_eq!(status(&open, &Method::GET, "example.com", ""), 200);
    }

    #[test]
    fn origins_are_checked() {
        for (origin, wanted) in [
            ("http://localhost:3000", 200),
            ("https://127.0.0.1", 200),
            ("tauri://anything", 200),
            ("https://example.com", 403),
            ("null", 403),
            ("chrome-extension://abc", 403),
            ("http://here:1", 200),
        ] {
            let host = if origin == "http://here:1" { "here:1" } else { "localhost" };
            let gate = Gate { here: None, ..gate("") };
            assert_eq!(status(&gate, &Method::GET, host, origin), wanted, "{origin}");
        }
        assert_eq!(status(&gate("chrome-extension://*"), &Method::GET, "localhost", "chrome-extension://abc"), 200);
        assert_eq!(status(&gate("*"), &Method::GET, "localhost", "https://example.com"), 200);
        assert!(Origins::new("http://*.*").is_err());
    }

    #[test]
    fn what_is_denied_still_names_the_methods_of_its_route() {
        let headers = HeaderMap::from_iter([
            (header::HOST, HeaderValue::from_static("localhost")),
            (header::ORIGIN, HeaderValue::from_static("https://evil.example")),
        ]);
        let answer = gate("")
            .check(&Method::OPTIONS, &Facts::of(&headers), &Uri::from_static("/api/chat"), Some("POST"))
            .unwrap_err();
        assert_eq!((answer.status().as_u16(), &answer.headers()["allow"]), (403, &HeaderValue::from_static("POST")));
    }

    #[test]
    fn who_a_uri_names_is_not_its_host() {
        let uri = Uri::from_static("http://user:word@localhost/api/tags");
        assert!(gate("").check(&Method::GET, &Facts::default(), &uri, None).is_ok());
    }

    #[test]
    fn options_is_answered_for_names_only() {
        assert_eq!(status(&gate(""), &Method::OPTIONS, "localhost", ""), 204);
        assert_eq!(status(&gate(""), &Method::OPTIONS, "127.0.0.1", ""), 200);
        assert_eq!(status(&gate(""), &Method::OPTIONS, "127.0.0.1", "http://localhost"), 204);
    }
}
