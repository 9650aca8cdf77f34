//! Bytes and texts such as somebody sends who looks for a fault in what reads them: made of pieces that readers look for, in any
//! order. The same in every run.

/// Texts of up to twelve of these pieces.
pub(crate) fn texts(pieces: &'static [&'static str], count: usize) -> impl Iterator<Item = String> {
    let mut random = fastrand::Rng::with_seed(u64::from(0x0101_u16));
    (0..count).map(move |_| (0..random.usize(0..12)).map(|_| pieces[random.usize(0..pieces.len())]).collect())
}

/// Some bytes, cut into pieces.
pub(crate) fn cut(bytes: &[u8], seed: u64) -> Vec<&[u8]> {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut pieces, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let (piece, more) = rest.split_at(random.usize(1..=rest.len().min(16)));
        pieces.push(piece);
        rest = more;
    }
    pieces
}

/// How many are tried.
pub(crate) const MANY: usize = 20_000;

mod tests {
    use std::path::Path;

    use super::*;
    use crate::agent::ProxyAddress;
    use crate::config::Config;
    use crate::discovery::{NameServer, NameSpec, Range};
    use crate::models::store::{Digest, Manifest};
    use crate::ollama::Endpoint;
    use crate::pool::ServerSpec;
    use crate::security::Token;
    use crate::state::Url;
    use olol_middleware::ModelName;

    const PLACES: &[&str] = &[
        "http://",
        "https://",
        "dns://",
        "srv+http://",
        "tls://",
        "grpc://",
        "unix:",
        "://",
        "@",
        ":",
        "::",
        "[",
        "]",
        "%",
        "/",
        "..",
        "\\",
        "=",
        ",",
        " ",
        "\n",
        "\0",
        "a",
        "gpu1",
        "127.0.0.1",
        "::1",
        "fe80::1",
        "%eth0",
        "50051",
        "0",
        "65536",
        "-1",
        "=3",
        "*",
        "ä",
        "\u{202e}",
        "x.lab",
        "?",
        "#",
        "192.168.1.0/24",
        "/33",
    ];

    #[test]
    fn places_are_read_or_refused_whatever_they_are() {
        for text in texts(PLACES, MANY) {
            if let Ok(endpoint) = Endpoint::parse(&text, 1) {
                let shown = endpoint.to_string();
                assert_eq!(Endpoint::parse(&shown, 1).map(|again| again.to_string()), Ok(shown), "{text:?}");
            }
            if let Ok(address) = text.parse::<ProxyAddress>() {
                assert_eq!(address.to_string().parse::<ProxyAddress>(), Ok(address), "{text:?}");
            }
            if let Ok(spec) = ServerSpec::parse(&text) {
                assert!(!spec.id.as_str().contains(['\n', '\0', '\r']), "{text:?}: {spec:?}");
            }
            let _ = Endpoint::from_ollama_host(&text);
            let _ = NameSpec::parse(&text).map(|spec| spec.map(|spec| spec.to_string()));
            let _ = NameServer::try_from(text.clone());
            let _ = text.parse::<Range>();
            let url = Url::new(text.clone());
            let _ = (url.check(), url.to_string());
            assert_eq!(crate::state::masked(&text).chars().count(), text.chars().count(), "{text:?}");
        }
    }

    #[test]
    fn nothing_is_a_digest_or_a_name_that_leads_elsewhere() {
        const PIECES: &[&str] = &[
            "sha256:",
            "sha256-",
            "..",
            "/",
            "\\",
            "\0",
            ":",
            "-",
            ".",
            "_",
            "@",
            "%2f",
            "a",
            "Z",
            "g",
            "ä",
            "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "0123456789abcdef0123456789abcdef",
            "latest",
            "registry.ollama.ai",
            "library",
            "https://",
            "~",
            " ",
        ];
        for text in texts(PIECES, MANY) {
            if let Ok(digest) = Digest::parse(&text) {
                assert!(
                    digest.hex().len() == 64 && digest.hex().bytes().all(|byte| byte.is_ascii_hexdigit()),
                    "{text:?}"
                );
            }
            for part in ModelName::parts(&text).into_iter().flatten() {
                let leads_away =
                    part.is_empty() || part.starts_with('.') || part.contains(['/', '\\', '\0', '%', '~', ' ']);
                assert!(!leads_away && Path::new(part).components().count() == 1, "{text:?}: {part:?}");
            }
            if let Some(name) = ModelName::parse(&text) {
                assert_eq!(ModelName::parse(name.as_str()).as_ref(), Some(&name), "{text:?}");
            }
            let _ = ModelName::is_unfinished(&text);
            if let Ok(token) = text.parse::<Token>() {
                assert!(token.reveal().is_ascii() && !token.reveal().contains([' ', '\\']), "{text:?}");
            }
        }
    }

    #[test]
    fn files_are_read_or_refused_whatever_is_in_them() {
        const PIECES: &[&str] = &[
            "[",
            "]",
            "{",
            "}",
            "\"",
            "'",
            "=",
            "\n",
            ",",
            ":",
            "#",
            "keys",
            "keys.ada",
            "id",
            "sha256",
            "\"0123\"",
            "layers",
            "digest",
            "size",
            "config",
            "\"sha256:x\"",
            "1",
            "-1",
            "1e999",
            "nan",
            "inf",
            "true",
            "null",
            "[proxy]\n",
            "[limits]\n",
            "port",
            "body-memory",
            "[stack]\norder",
            "2026-01-01",
            "99999999999999999999",
            "\u{feff}",
            "\0",
            "[[models]]\n",
            "name",
        ];
        for text in texts(PIECES, MANY) {
            let _ = toml::from_str::<Config>(&text).map(|config| config.validate().is_ok());
            let _ = Manifest::parse(text.clone().into());
            let _ = crate::keys::parse(&text, Path::new("keys.toml"));
        }
    }
}
