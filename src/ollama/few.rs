//! Lists of a server that are believed up to some length, and values of which only the plain ones are wanted: what is empty takes
//! three bytes in an answer, and a hundred times that in memory.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The first of a list; what stands behind them is passed over.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Few<T, const MOST: usize>(pub(super) Vec<T>);

impl<T, const MOST: usize> Default for Few<T, MOST> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Few<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader<T, const MOST: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Reader<T, MOST> {
            type Value = Few<T, MOST>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut first = Vec::new();
                while first.len() < MOST {
                    let Some(next) = list.next_element()? else { return Ok(Few(first)) };
                    first.push(next);
                }
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Few(first))
            }
        }

        from.deserialize_seq(Reader(PhantomData))
    }
}

/// A text or a number; anything else is passed over.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plain {
    Text(String),
    Number(u64),
    Other,
}

impl<'de> Deserialize<'de> for Plain {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Plain;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_str<E>(self, text: &str) -> Result<Plain, E> {
                Ok(Plain::Text(text.to_owned()))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Plain, E> {
                Ok(Plain::Number(number))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Plain, E> {
                Ok(Plain::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Plain, E> {
                Ok(Plain::Other)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Plain, E> {
                Ok(Plain::Other)
            }

            fn visit_unit<E>(self) -> Result<Plain, E> {
                Ok(Plain::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Plain, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Plain::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Plain, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Plain::Other)
            }
        }

        from.deserialize_any(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_so_far_and_no_further() {
        let read = |text: &str| serde_json::from_str::<Few<u32, 2>>(text).map_err(|error| error.to_string());
        assert_eq!(read("[1]"), Ok(Few(vec![1])));
        assert_eq!(read(r#"[1, 2, "three", {}]"#), Ok(Few(vec![1, 2])));
        assert!(read("[1, 2, 3").is_err() && read(r#"["one"]"#).is_err() && read("{}").is_err());
    }

    #[test]
    fn what_is_not_plain_is_passed_over() {
        let text = r#"["a", 1, -1, 1.5, true, null, [[]], {"a": {"b": 1}}]"#;
        let read: Vec<Plain> = serde_json::from_str(text).unwrap();
        assert_eq!(read[..2], [Plain::Text("a".to_owned()), Plain::Number(1)]);
        assert!(read[2..].iter().all(|value| *value == Plain::Other));
    }
}
