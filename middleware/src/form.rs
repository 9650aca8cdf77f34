//! The model that a multipart form names, read so strictly that the server cannot read another.
//!
//! For keys that may use some models only. [`crate::Peek`] finds the field in any form that is written as usual; a form may
//! also be written so that it finds something else than Go does. What is not written as every client writes it names nothing
//! here.

use memchr::memmem;

/// The value of the first field `model`; `None` if there is none, or if the form is not written as usual.
pub(crate) fn model<'a>(content_type: &[u8], body: &'a [u8]) -> Option<&'a str> {
    let boundary = boundary(content_type)?;
    let delimiter = format!("\r\n--{boundary}");
    let mut rest = body.strip_prefix(&delimiter.as_bytes()[2..])?;
    loop {
        // Behind the last one stand two hyphens.
        rest = rest.strip_prefix(b"\r\n")?;
        let head = &rest[..memmem::find(rest, b"\r\n\r\n")?];
        rest = &rest[head.len() + 4..];
        let content = &rest[..memmem::find(rest, delimiter.as_bytes())?];
        rest = &rest[content.len() + delimiter.len()..];
        if is_model(head)? {
            return std::str::from_utf8(content).ok();
        }
    }
}

fn boundary(content_type: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(content_type).ok()?;
    let (kind, boundary) = text.split_once(';')?;
    let boundary = boundary.trim().strip_prefix("boundary=")?;
    let boundary = boundary.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(boundary);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"'()+_,-./:=?".contains(&byte);
    let fits = kind.trim().eq_ignore_ascii_case("multipart/form-data") && (1..=70).contains(&boundary.len());
    (fits && boundary.bytes().all(is_plain)).then_some(boundary)
}

/// Whether the head of a part is that of the field `model`; `None` if it could be taken for something else than it is.
fn is_model(head: &[u8]) -> Option<bool> {
    let mut names = None;
    for line in std::str::from_utf8(head).ok()?.split("\r\n") {
        let (field, value) = line.split_once(':')?;
        if line.starts_with([' ', '\t']) || line.contains(['\r', '\n']) {
            return None;
        }
        if field.trim().eq_ignore_ascii_case("content-disposition") && names.replace(value).is_some() {
            return None;
        }
    }
    let (name, more) = names?.trim().strip_prefix("form-data; name=\"")?.split_once('"')?;
    let is_field = more.is_empty();
    let is_file = more.strip_prefix("; filename=").is_some_and(|more| !more.to_ascii_lowercase().contains("name"));
    match name {
        "model" if is_field => Some(true),
        "model" => None,
        _ if name.contains('\\') => None,
        _ if is_field || is_file => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: &[u8] = b"multipart/form-data; boundary=xx";

    fn form(parts: &[(&str, &str)]) -> Vec<u8> {
        let part = |(head, content): &(&str, &str)| format!("--xx\r\n{head}\r\n\r\n{content}\r\n");
        (parts.iter().map(part).collect::<String>() + "--xx--\r\n").into_bytes()
    }

    fn field(name: &str) -> String {
        format!("Content-Disposition: form-data; name=\"{name}\"")
    }

    #[test]
    fn a_usual_form_names_its_model_wherever_it_stands() {
        let file = field("file") + "; filename=\"a.wav\"\r\nContent-Type: audio/wav";
        let decoy = "RIFF\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nother\r\n";
        let body =
            form(&[(&file, decoy), (&field("language"), "en"), (&field("model"), "whisper"), (&field("model"), "x")]);
        assert_eq!(model(KIND, &body), Some("whisper"));
        assert_eq!(model(b"Multipart/Form-Data; boundary=\"xx\"", &body), Some("whisper"));
    }

    #[test]
    fn a_form_that_could_be_read_in_two_ways_names_nothing() {
        let good = (field("model"), "tiny");
        for head in [
            "Content-Disposition: form-data; name=model",
            "Content-Disposition: form-data; name*=UTF-8''model",
            "Content-Disposition: form-data; name=\"mo\\del\"",
            "Content-Disposition: form-data; name=\"a\"; Name=\"model\"",
            "Content-Disposition: form-data; name=\"a\"; filename=\"b\"; name=\"model\"",
            "Content-Disposition: form-data; name=\"model\"; filename=\"b\"",
            "Content-Disposition: form-data;\r\n name=\"model\"",
            "Content-Disposition: form-data; name=\"a\"\r\nContent-Disposition: form-data; name=\"model\"",
            "Content-Type: text/plain",
            "\r\n",
        ] {
            assert_eq!(model(KIND, &form(&[(head, "secret"), (&good.0, good.1)])), None, "{head}");
        }
        let body = form(&[(&good.0, good.1)]);
        assert_eq!(model(KIND, &[b"before\r\n", &*body].concat()), None);
        assert_eq!(model(KIND, &[&b"--xx \r\n"[..], &body].concat()), None);
        for kind in [
            &b"multipart/form-data"[..],
            b"multipart/form-data; boundary=yy",
            b"multipart/form-data; boundary=xx; boundary=yy",
            b"",
        ] {
            assert_eq!(model(kind, &body), None);
        }
        assert_eq!(
            (model(KIND, b""), model(KIND, b"--xx--\r\n"), model(KIND, &body[..body.len() - 9])),
            (None, None, None)
        );
    }
}
