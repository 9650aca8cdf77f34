//! Pages of a long list: which one is wanted, and how it is written. Only the page is built, never the whole.

use std::cmp::Ordering;

use axum::extract::Query;
use http::Uri;
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::found::Found;
use super::time::rfc3339;

/// Entries of a page, if nobody says how many.
const USUAL: usize = 100;
/// The most entries of a page.
const MOST: usize = 1000;
/// The longest cursor, bytes: longer than any name.
const LONGEST: usize = 1024;

/// What is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// The proxy itself: one entry.
    Proxy,
    /// The servers, by name.
    Servers,
    /// The models, by canonical name.
    Models,
    /// Who asks.
    Clients,
    /// The sessions.
    Sessions,
}

impl Detail {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Proxy, Self::Servers, Self::Models, Self::Clients, Self::Sessions];

    /// The word for it; the list stands under it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Servers => "servers",
            Self::Models => "models",
            Self::Clients => "clients",
            Self::Sessions => "sessions",
        }
    }
}

/// Which page is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Of which list.
    pub detail: Detail,
    /// The last entry of the page before.
    pub after: Option<String>,
    /// The most entries.
    pub limit: usize,
}

impl Wanted {
    /// Whether a query asks for a page, and not for the summary.
    pub fn is_in(query: Option<&str>) -> bool {
        query.is_some_and(|query| {
            query.split('&').any(|pair| pair.split_once('=').map_or(pair, |(name, _)| name) == "detail")
        })
    }

    /// Reads the query of a page. `fixed` is the list, where the path says it.
    pub fn read(uri: &Uri, fixed: Option<Detail>) -> Result<Self, String> {
        const KEYS: &str = "the query may say detail, after and limit";
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
            .map_err(|error| format!("the query cannot be read: {error}; {KEYS}"))?;
        let mut wanted = Self { detail: fixed.unwrap_or(Detail::Servers), after: None, limit: USUAL };
        for (name, value) in pairs {
            match name.as_str() {
                "detail" if fixed.is_none() => wanted.detail = detail(&value)?,
                "detail" if detail(&value)? == wanted.detail => {}
                "detail" => return Err(format!("this page lists {}; ask GET /api/status", wanted.detail.as_str())),
                "after" => wanted.after = Some(cursor(value)?),
                "limit" => wanted.limit = limit(&value)?,
                other => return Err(format!("'{}' is not known here: {KEYS}", shown(other))),
            }
        }
        Ok(wanted)
    }

    /// The entries of this page, in order, and whether there are more. `after` tells whether an entry comes after the cursor.
    pub fn cut<T>(
        &self,
        mut all: Vec<T>,
        order: impl Fn(&T, &T) -> Ordering,
        after: impl Fn(&T, &str) -> bool,
    ) -> (Vec<T>, bool) {
        if let Some(cursor) = &self.after {
            all.retain(|entry| after(entry, cursor));
        }
        let has_more = all.len() > self.limit;
        if has_more {
            // What comes later is not put in order.
            all.select_nth_unstable_by(self.limit, &order);
            all.truncate(self.limit);
        }
        all.sort_unstable_by(order);
        (all, has_more)
    }
}

fn detail(text: &str) -> Result<Detail, String> {
    Detail::ALL.into_iter().find(|detail| detail.as_str() == text).ok_or_else(|| {
        let words = Detail::ALL.map(Detail::as_str).join(", ");
        format!("there is no detail '{}'; there are: {words}", shown(text))
    })
}

fn cursor(text: String) -> Result<String, String> {
    let is_fit = !text.is_empty() && text.len() <= LONGEST && !text.chars().any(char::is_control);
    is_fit.then_some(text).ok_or_else(|| {
        "after must be the `next` of the page before, as it stood there; leave it out for the first page".to_owned()
    })
}

fn limit(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("limit must be a whole number from 1 to {MOST}, and '{}' is none", shown(text)))
}

/// The beginning of what a client typed.
fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

/// A page as it is written.
#[derive(Debug)]
pub struct Page<'a, T> {
    /// What is listed.
    pub detail: Detail,
    /// The process that lists it.
    pub instance: &'a str,
    /// How many there are on all pages.
    pub total: usize,
    /// The entries.
    pub entries: &'a [T],
    /// The cursor of the page after this one; `None`: this is the last.
    pub next: Option<&'a str>,
    /// What was found on the network and is none of the entries; on the first page of the servers.
    pub(super) found: Option<Vec<Found>>,
}

impl<T: Serialize> Serialize for Page<'_, T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(6))?;
        map.serialize_entry("detail", self.detail.as_str())?;
        map.serialize_entry("instance", self.instance)?;
        map.serialize_entry("collected_at", &rfc3339(std::time::SystemTime::now()))?;
        map.serialize_entry("total", &self.total)?;
        map.serialize_entry(self.detail.as_str(), self.entries)?;
        map.serialize_entry("next", &self.next)?;
        if let Some(found) = &self.found {
            map.serialize_entry("found", found)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(query: &str) -> Result<Wanted, String> {
        Wanted::read(&format!("/api/status?{query}").parse().unwrap(), None)
    }

    #[test]
    fn a_page_is_asked_for_by_list_cursor_and_number() {
        let wanted = read("detail=models&after=a%2Fb%3A7b&limit=5").unwrap();
        assert_eq!(wanted, Wanted { detail: Detail::Models, after: Some("a/b:7b".to_owned()), limit: 5 });
        assert_eq!(read("detail=servers").unwrap().limit, 100);
        assert!(Wanted::is_in(Some("a=b&detail=servers")) && !Wanted::is_in(Some("details=1")) && !Wanted::is_in(None));
    }

    #[test]
    fn what_is_wrong_with_a_query_is_said_with_what_would_be_right() {
        for (query, says) in [
            ("detail=server", "no detail 'server'; there are: proxy, servers, models, clients, sessions"),
            ("detail=servers&limit=0", "from 1 to 1000, and '0' is none"),
            ("detail=servers&limit=1001", "from 1 to 1000"),
            ("detail=servers&limit=many", "'many' is none"),
            ("detail=servers&after=", "`next` of the page before"),
            ("detail=servers&after=a%0Ab", "`next` of the page before"),
            ("detail=servers&aftr=x", "'aftr' is not known here"),
        ] {
            let error = read(query).unwrap_err();
            assert!(error.contains(says), "{query}: {error}");
        }
    }

    #[test]
    fn pages_follow_one_another_to_the_end_whatever_comes_and_goes() {
        let mut all: Vec<String> = (0..25).map(|number| format!("{number:02}")).rev().collect();
        let mut wanted = Wanted { detail: Detail::Servers, after: None, limit: 10 };
        let mut seen = Vec::new();
        loop {
            let (page, has_more) = wanted.cut(all.clone(), Ord::cmp, |entry, cursor| entry.as_str() > cursor);
            wanted.after = page.last().cloned();
            seen.extend(page);
            // The one that the next page begins after has gone.
            all.retain(|entry| Some(entry) != wanted.after.as_ref());
            if !has_more {
                break;
            }
        }
        assert_eq!(seen, (0..25).map(|number| format!("{number:02}")).collect::<Vec<_>>());
    }
}
