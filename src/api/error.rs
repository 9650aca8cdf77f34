//! Errors of ours in the words and the form that a client of each dialect expects.

use std::error::Error as StdError;
use std::io;

use olol_middleware::json::quoted;
use olol_middleware::{Dialect, Error};

/// The body of an answer that tells of an error. Keys stand in Ollama's order.
pub(crate) fn body(dialect: Dialect, error: &Error) -> String {
    // A body that cannot be read is refused before anybody knows what it is about.
    if let Error::Body(source) = error
        && let Some(text) = go_text(source.as_ref())
    {
        return format!(r#"{{"error":{}}}"#, quoted(text));
    }
    let text = quoted(&error.to_string());
    let status = error.status().as_u16();
    match dialect {
        Dialect::Ollama => format!(r#"{{"error":{text}}}"#),
        Dialect::OpenAi => {
            let kind = match status {
                400 => "invalid_request_error",
                401 => "authentication_error",
                403 => "permission_error",
                404 => "not_found_error",
                429 => "rate_limit_error",
                _ => "api_error",
            };
            format!(r#"{{"error":{{"message":{text},"type":"{kind}","param":null,"code":null}}}}"#)
        }
        Dialect::Anthropic => {
            let kind = match status {
                400 => "invalid_request_error",
                401 => "authentication_error",
                403 => "permission_error",
                404 => "not_found_error",
                429 => "rate_limit_error",
                503 => "overloaded_error",
                _ => "api_error",
            };
            let id = format!("req_{:012x}{:012x}", fastrand::u64(..1 << 48), fastrand::u64(..1 << 48));
            format!(r#"{{"type":"error","error":{{"type":"{kind}","message":{text}}},"request_id":"{id}"}}"#)
        }
    }
}

/// What Go says of a body that hyper cannot read; `None` if it is something else that went wrong.
fn go_text(source: &(dyn StdError + 'static)) -> Option<&'static str> {
    let mut source = source;
    let error = loop {
        if let Some(error) = source.downcast_ref::<io::Error>() {
            break error;
        }
        source = match source.downcast_ref::<Error>() {
            Some(Error::Body(inner)) => inner.as_ref(),
            _ => source.source()?,
        };
    };
    let text = error.to_string();
    Some(match error.kind() {
        io::ErrorKind::UnexpectedEof => "unexpected EOF",
        io::ErrorKind::InvalidInput if text.starts_with("Invalid chunk size") => "invalid byte in chunk length",
        io::ErrorKind::InvalidInput if text.starts_with("Invalid chunk body") => "malformed chunked encoding",
        io::ErrorKind::InvalidData if text.contains("overflow") => "http chunk length too large",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_dialect_has_its_form() {
        assert_eq!(
            body(Dialect::Ollama, &Error::busy()),
            r#"{"error":"server busy, please try again.  maximum pending requests exceeded"}"#
        );
        assert_eq!(
            body(Dialect::OpenAi, &Error::NoServer("<a>".into())),
            r#"{"error":{"message":"no server can answer now: \u003ca\u003e","type":"api_error","param":null,"code":null}}"#
        );
        assert!(
            body(Dialect::Anthropic, &Error::busy())
                .starts_with(r#"{"type":"error","error":{"type":"overloaded_error","message":"server busy"#)
        );
    }

    #[test]
    fn a_body_that_cannot_be_read_is_told_in_the_words_of_go() {
        let error = |kind, text: &str| Error::Body(Box::new(Error::Body(io::Error::new(kind, text).into())));
        for (kind, text, wanted) in [
            (io::ErrorKind::InvalidInput, "Invalid chunk size line: Invalid Size", "invalid byte in chunk length"),
            (io::ErrorKind::InvalidInput, "Invalid chunk body CR", "malformed chunked encoding"),
            (io::ErrorKind::UnexpectedEof, "end of file", "unexpected EOF"),
        ] {
            assert_eq!(body(Dialect::OpenAi, &error(kind, text)), format!(r#"{{"error":"{wanted}"}}"#));
        }
        assert!(body(Dialect::Ollama, &error(io::ErrorKind::TimedOut, "slow")).contains("ended early"));
    }
}
