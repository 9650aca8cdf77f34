//! Errors of ours in the words and the form that a client of each dialect expects.

use olol_middleware::{Dialect, Error};
use serde_json::json;

/// The body of an answer that tells of an error.
pub(crate) fn body(dialect: Dialect, error: &Error) -> String {
    let text = error.to_string();
    let status = error.status().as_u16();
    let value = match dialect {
        Dialect::Ollama => json!({"error": text}),
        Dialect::OpenAi => {
            let kind = match status {
                400 => "invalid_request_error",
                404 => "not_found_error",
                _ => "api_error",
            };
            json!({"error": {"message": text, "type": kind, "param": null, "code": null}})
        }
        Dialect::Anthropic => {
            let kind = match status {
                400 => "invalid_request_error",
                403 => "permission_error",
                404 => "not_found_error",
                503 => "overloaded_error",
                _ => "api_error",
            };
            let id = format!("req_{:012x}{:012x}", fastrand::u64(..1 << 48), fastrand::u64(..1 << 48));
            json!({"type": "error", "error": {"type": kind, "message": text}, "request_id": id})
        }
    };
    value.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_dialect_has_its_form() {
        assert_eq!(
            body(Dialect::Ollama, &Error::Busy),
            r#"{"error":"server busy, please try again.  maximum pending requests exceeded"}"#
        );
        assert!(body(Dialect::OpenAi, &Error::Busy).contains(r#""type":"api_error""#));
        assert!(body(Dialect::Anthropic, &Error::Busy).contains(r#""type":"overloaded_error""#));
    }
}
