//! How long a model stays in memory after a request: `keep_alive` as Ollama reads it (`api.Duration`).

use std::time::Duration;

use serde_json::Value;

/// What a request that says nothing gets.
const DEFAULT: Duration = Duration::from_secs(5 * 60);

/// How long a model stays loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeepAlive {
    /// This long after the request; zero unloads at once.
    For(Duration),
    /// Until it is told to go.
    Forever,
}

impl KeepAlive {
    /// Reads the member of a request. The error is in Ollama's words.
    pub(super) fn read(value: Option<&Value>) -> Result<Self, String> {
        match value {
            None | Some(Value::Null) => Ok(Self::For(DEFAULT)),
            Some(Value::Number(seconds)) => Ok(Self::seconds(seconds.as_f64().unwrap_or(0.0))),
            Some(Value::String(text)) => go_duration(text).map(Self::seconds),
            Some(Value::Bool(_)) => Err("Unsupported type: 'bool'".to_owned()),
            Some(Value::Array(_)) => Err("Unsupported type: '[]interface {}'".to_owned()),
            Some(Value::Object(_)) => Err("Unsupported type: 'map[string]interface {}'".to_owned()),
        }
    }

    /// Whether the model goes right after the request.
    pub(super) fn is_zero(self) -> bool {
        self == Self::For(Duration::ZERO)
    }

    fn seconds(seconds: f64) -> Self {
        if seconds < 0.0 {
            Self::Forever
        } else {
            Duration::try_from_secs_f64(seconds).map_or(Self::Forever, Self::For)
        }
    }
}

/// A duration as Go writes it (`1h30m`, `-1.5s`), in seconds. The errors are those of `time.ParseDuration`.
fn go_duration(text: &str) -> Result<f64, String> {
    let invalid = || format!("time: invalid duration {text:?}");
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0.0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let number = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let (amount, after) = rest.split_at(number);
        let amount: f64 = amount.parse().map_err(|_| invalid())?;
        let unit = after.len() - after.trim_start_matches(|c: char| !c.is_ascii_digit() && c != '.').len();
        let (unit, after) = after.split_at(unit);
        seconds += amount
            * match unit {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                "" => return Err(format!("time: missing unit in duration {text:?}")),
                other => return Err(format!("time: unknown unit {other:?} in duration {text:?}")),
            };
        rest = after;
    }
    Ok(sign * seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: &Value) -> Result<KeepAlive, String> {
        KeepAlive::read(Some(value))
    }

    #[test]
    fn it_is_read_as_ollama_reads_it() {
        let seconds = |seconds| Ok(KeepAlive::For(Duration::from_secs_f64(seconds)));
        assert_eq!(KeepAlive::read(None), seconds(300.0));
        for (value, wanted) in [
            (json!(null), seconds(300.0)),
            (json!(0), seconds(0.0)),
            (json!(2.5), seconds(2.5)),
            (json!("0"), seconds(0.0)),
            (json!("1m0s"), seconds(60.0)),
            (json!("1h1.5m"), seconds(3690.0)),
            (json!("250ms"), seconds(0.25)),
            (json!(-1), Ok(KeepAlive::Forever)),
            (json!("-1m"), Ok(KeepAlive::Forever)),
            (json!(1e300), Ok(KeepAlive::Forever)),
        ] {
            assert_eq!(read(&value), wanted, "{value}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_its_words() {
        for (value, wanted) in [
            (json!("soon"), "time: invalid duration \"soon\""),
            (json!(""), "time: invalid duration \"\""),
            (json!("5"), "time: missing unit in duration \"5\""),
            (json!("5x"), "time: unknown unit \"x\" in duration \"5x\""),
            (json!(true), "Unsupported type: 'bool'"),
        ] {
            assert_eq!(read(&value), Err(wanted.to_owned()));
        }
    }
}
