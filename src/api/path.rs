//! Paths as Go's server and Ollama's router read them: cleaned, decoded, and redirected.

use std::borrow::Cow;

use http::header::{self, HeaderValue};
use http::{Method, Response, StatusCode, Uri};
use olol_middleware::Route;

use super::body::HttpBody;
use super::response;

/// The decoded path of a request; or the answer to one whose path is not clean.
pub(super) fn read<'a>(method: &Method, uri: &'a Uri) -> Result<Cow<'a, str>, Box<Response<HttpBody>>> {
    let raw = uri.path();
    if raw == "*" && method == Method::OPTIONS {
        return Err(Box::new(response::full(StatusCode::OK, "")));
    }
    if raw == "*" {
        return Err(Box::new(response::closing(StatusCode::BAD_REQUEST, "no-path")));
    }
    if method == Method::CONNECT && uri.authority().is_some() {
        return Err(Box::new(response::no_path()));
    }
    let clean = clean(raw);
    if method != Method::CONNECT && clean != raw {
        return Err(Box::new(redirect(method, StatusCode::TEMPORARY_REDIRECT, &clean, uri.query())));
    }
    decode(raw).ok_or_else(|| Box::new(response::bad_request("")))
}

/// The redirect of a path that is a route but for a slash at its end.
pub(super) fn trailing_slash(method: &Method, path: &str, uri: &Uri) -> Option<Response<HttpBody>> {
    let without = path.strip_suffix('/').filter(|without| !without.is_empty())?;
    Route::find(without).filter(|route| route.takes(method))?;
    let code = if method == Method::GET { StatusCode::MOVED_PERMANENTLY } else { StatusCode::TEMPORARY_REDIRECT };
    // A slash that was written as an escape is one too.
    let without = uri.path().strip_suffix('/').unwrap_or(without);
    Some(redirect(method, code, without, uri.query()))
}

/// Removes empty and dot segments, and keeps a slash at the end, as Go's `cleanPath`.
fn clean(path: &str) -> Cow<'_, str> {
    // One pass over the bytes: a search for each of the two would cost more than the path is long.
    let doubtful = |pair: &[u8]| pair[0] == b'/' && matches!(pair[1], b'/' | b'.');
    if path.starts_with('/') && !path.as_bytes().windows(2).any(doubtful) {
        return Cow::Borrowed(path);
    }
    let mut kept: Vec<&str> = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => {
                kept.pop();
            }
            other => kept.push(other),
        }
    }
    let mut clean = format!("/{}", kept.join("/"));
    if path.ends_with('/') && clean != "/" {
        clean.push('/');
    }
    Cow::Owned(clean)
}

/// Percent-decodes; `None` for an escape that is none.
fn decode(path: &str) -> Option<Cow<'_, str>> {
    if !path.as_bytes().contains(&b'%') {
        return Some(Cow::Borrowed(path));
    }
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &rest[2..];
        } else {
            bytes.push(*first);
        }
    }
    Some(Cow::Owned(String::from_utf8_lossy(&bytes).into_owned()))
}

/// A redirect as Go's `http.Redirect` writes it.
fn redirect(method: &Method, code: StatusCode, path: &str, query: Option<&str>) -> Response<HttpBody> {
    let location = query.map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
    let is_page = method == Method::GET;
    let body = if is_page {
        let shown = location
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
            .replace('"', "&#34;")
            .replace('\'', "&#39;");
        format!("<a href=\"{shown}\">{}</a>.\n\n", code.canonical_reason().unwrap_or_default())
    } else {
        String::new()
    };
    let mut answer = response::full(code, body);
    if is_page || method == Method::HEAD {
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    }
    if let Ok(location) = HeaderValue::from_str(&location) {
        answer.headers_mut().insert(header::LOCATION, location);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_as_go_does() {
        for (path, wanted) in [
            ("/api/tags", "/api/tags"),
            ("//api//tags", "/api/tags"),
            ("/api/../api/tags", "/api/tags"),
            ("/api/./tags/", "/api/tags/"),
            ("/..", "/"),
            ("/.well-known", "/.well-known"),
            ("/a/...", "/a/..."),
        ] {
            assert_eq!(clean(path), wanted);
        }
    }

    #[test]
    fn escapes_are_decoded() {
        assert_eq!(decode("/api/%74ags").as_deref(), Some("/api/tags"));
        assert_eq!(decode("/v1/models/a%2Fb").as_deref(), Some("/v1/models/a/b"));
        assert_eq!(decode("/%zz"), None);
        assert_eq!(decode("/%4"), None);
    }

    #[test]
    fn a_slash_too_many_is_redirected_only_for_methods_that_the_route_takes() {
        let uri = Uri::from_static("/api/tags/?a=1");
        let answer = trailing_slash(&Method::GET, "/api/tags/", &uri).unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["location"]),
            (301, &HeaderValue::from_static("/api/tags?a=1"))
        );
        assert!(trailing_slash(&Method::DELETE, "/api/tags/", &uri).is_none());
        let answer = trailing_slash(&Method::GET, "/api/tags/", &Uri::from_static("/api/tags%2f")).unwrap();
        assert_eq!(answer.headers()["location"], "/api/tags");
        assert!(trailing_slash(&Method::GET, "/", &Uri::from_static("/")).is_none());
    }
}
