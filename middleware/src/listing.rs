//! Adds names to a list of models: each with the entry of the model that it leads to, copied as the server made it.

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use crate::json::{self, Kind, Malformed, Reader, Span};
use crate::names::ModelName;
use crate::route::Route;

/// A name, and the model that it leads to.
pub type Further<'a> = (&'a str, &'a ModelName);

/// A list with further names in it, each behind the entry of its model; `None` if there is none to add. A name that the
/// list has already is not added.
pub fn with_names(route: Route, list: &Bytes, further: &[Further<'_>]) -> Option<Bytes> {
    let (array, keys): (&[u8], &[&[u8]]) = match route {
        Route::V1Models => (b"data", &[b"id"]),
        _ => (b"models", &[b"name", b"model"]),
    };
    let entries = entries(list, array, keys).ok()?;
    let is_listed = |name: &str| {
        let canonical = ModelName::parse(name);
        entries.iter().any(|entry| entry.text == name || (canonical.is_some() && entry.name == canonical))
    };
    let wanted: Vec<&Further<'_>> = further.iter().filter(|(name, _)| !is_listed(name)).collect();
    let mut made = BytesMut::new();
    let mut done = 0;
    for entry in &entries {
        for (name, _) in wanted.iter().filter(|(_, model)| entry.name.as_ref() == Some(*model)) {
            made.extend_from_slice(&list[done..entry.span.end]);
            made.extend_from_slice(b",");
            let mut from = entry.span.start;
            for place in &entry.places {
                made.extend_from_slice(&list[from..place.start]);
                made.extend_from_slice(json::quoted(name).as_bytes());
                from = place.end;
            }
            made.extend_from_slice(&list[from..entry.span.end]);
            done = entry.span.end;
        }
    }
    if done == 0 {
        return None;
    }
    made.extend_from_slice(&list[done..]);
    Some(made.freeze())
}

/// An entry of a list.
struct Entry {
    span: Span,
    text: String,
    name: Option<ModelName>,
    /// Where its name stands.
    places: SmallVec<[Span; 2]>,
}

fn entries(list: &Bytes, array: &[u8], keys: &[&[u8]]) -> Result<Vec<Entry>, Malformed> {
    let pieces = std::slice::from_ref(list);
    let mut entries = Vec::new();
    members(&mut Reader::new(pieces), list, |key, reader| {
        if key != array || reader.peek()? != b'[' {
            return reader.value().map(drop);
        }
        reader.take(b'[')?;
        while !reader.take(b']')? {
            entries.push(entry(reader, list, keys)?);
            reader.take(b',')?;
        }
        Ok(())
    })?;
    Ok(entries)
}

fn entry(reader: &mut Reader<'_>, list: &Bytes, keys: &[&[u8]]) -> Result<Entry, Malformed> {
    reader.peek()?;
    let start = reader.offset();
    let mut text = String::new();
    let mut places = SmallVec::new();
    members(reader, list, |key, reader| {
        let (kind, span) = reader.value()?;
        if keys.contains(&key) && matches!(kind, Kind::String { .. }) {
            text = json::unescape(&list[span.start + 1..span.end - 1]);
            places.push(span);
        }
        Ok(())
    })?;
    Ok(Entry { span: Span { start, end: reader.offset() }, name: ModelName::parse(&text), text, places })
}

/// Passes an object; what is behind each key is for `each` to pass.
fn members<'a>(
    reader: &mut Reader<'a>,
    list: &Bytes,
    mut each: impl FnMut(&[u8], &mut Reader<'a>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    if !reader.take(b'{')? {
        return Err(Malformed);
    }
    while !reader.take(b'}')? {
        let key = reader.string()?;
        if !reader.take(b':')? {
            return Err(Malformed);
        }
        each(&list[key.start..key.end], reader)?;
        reader.take(b',')?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(route: Route, list: &'static str, further: &[(&str, &str)]) -> Option<String> {
        let models: Vec<ModelName> = further.iter().map(|(_, model)| ModelName::parse(model).unwrap()).collect();
        let further: Vec<Further<'_>> = further.iter().zip(&models).map(|((name, _), model)| (*name, model)).collect();
        let list = with_names(route, &Bytes::from_static(list.as_bytes()), &further)?;
        Some(String::from_utf8(list.to_vec()).unwrap())
    }

    #[test]
    fn a_name_has_the_entry_of_its_model() {
        let list = r#"{"models":[{"name":"Tiny:latest","model":"Tiny:latest","details":{"name":"no"},"new":[1]},{"name":"big:70b"}]}"#;
        let wanted = r#"{"models":[{"name":"Tiny:latest","model":"Tiny:latest","details":{"name":"no"},"new":[1]},{"name":"mine","model":"mine","details":{"name":"no"},"new":[1]},{"name":"big:70b"},{"name":"gpt"}]}"#;
        let further = [("mine", "tiny"), ("gpt", "big:70b"), ("nowhere", "other")];
        assert_eq!(listed(Route::Tags, list, &further).as_deref(), Some(wanted));
        let list = "{\"object\":\"list\",\"data\":[{\"id\":\"tiny:latest\",\"created\":1}]}\n";
        let wanted =
            "{\"object\":\"list\",\"data\":[{\"id\":\"tiny:latest\",\"created\":1},{\"id\":\"mine\",\"created\":1}]}\n";
        assert_eq!(listed(Route::V1Models, list, &[("mine", "tiny")]).as_deref(), Some(wanted));
    }

    #[test]
    fn what_is_there_already_or_cannot_be_read_stays() {
        let list = r#"{"models":[{"name":"tiny:latest"},{"name":"Mine:latest"}]}"#;
        assert_eq!(listed(Route::Tags, list, &[("mine", "tiny")]), None);
        for list in ["{\"models\":[]}", "{\"models\":null}", "{\"data\":[", "[]", "", "{\"models\":[1]}"] {
            assert_eq!(listed(Route::Tags, list, &[("mine", "tiny")]), None, "{list}");
        }
    }
}
