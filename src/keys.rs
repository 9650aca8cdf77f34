//! The file of keys: read at the start, followed while the proxy runs, and changed by `olol keys`.
//!
//! It holds no secrets of clients, only their hashes, but perhaps credentials for servers; so nothing of what stands in it is
//! ever said in an error or a log but names.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use http::HeaderValue;
use olol_middleware::Pattern;
use olol_middleware::auth::{self, Anonymous};
use olol_middleware::keys::{Digest, Key, Keys, PREFIX, Rights};
use olol_middleware::rate_limit::Limits;
use olol_middleware::slots::Priority;
use serde::{Deserialize, Deserializer, de};
use tokio::sync::watch::Receiver;
use tokio::task::JoinSet;
use toml::value::Datetime;
use toml_edit::{DocumentMut, Item, Table, value};

use crate::files;
use crate::watch::watch;

/// What a file that has nothing in it may soon have again: some editors empty it before they fill it.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Random bytes of an id: enough to tell keys apart.
const ID: usize = 4;
/// Random bytes of a secret: 160 bits.
const SECRET: usize = 20;
/// What a new file begins with.
const HEADER: &str = "\
# Keys of OLOL: what each client may do. Made by `olol keys add`, and yours to edit: a running proxy takes every change at
# once. The keys themselves are not here, only their SHA-256. docs/keys.md tells what else a key can have.
";

/// A file of keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read.
    #[error("the file of keys {path} cannot be read: {why}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why. It stands in the message, and so is no source.
        why: std::io::Error,
    },
    /// It is not what it should be. The message repeats nothing that could be secret.
    #[error("{path}: {place}{message}", path = path.display(), place = line.map(|line| format!("line {line}: ")).unwrap_or_default())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, where it is known.
        line: Option<usize>,
        /// What is wrong.
        message: String,
    },
}

/// The file that a configuration names, or `keys.toml` in the user's configuration folder.
pub fn path(config: &auth::Config) -> Option<PathBuf> {
    if config.file.as_os_str().is_empty() {
        crate::config::folder().map(|folder| folder.join("keys.toml"))
    } else {
        Some(config.file.clone())
    }
}

/// Reads the keys for the first time, and follows their file from then on, until the set of tasks is dropped. No file is no
/// keys; one that is wrong is an error.
pub fn start(config: &auth::Config, keys: &Arc<Keys>) -> Result<JoinSet<()>, KeysError> {
    let mut tasks = JoinSet::new();
    if let Some(path) = path(config) {
        let changes = watch(&path);
        match read(&path) {
            Err(KeysError::File { why, .. }) if why.kind() == std::io::ErrorKind::NotFound => {
                tracing::debug!(file = %path.display(), "there are no keys yet");
            }
            read => take(keys, read?, &path),
        }
        tasks.spawn(follow(changes, path, keys.clone()));
    }
    if config.anonymous == Anonymous::Deny && !keys.exist() {
        tracing::warn!(
            "[auth] anonymous is \"deny\" and there are no keys: nobody may ask; `olol keys add NAME` makes one"
        );
    }
    Ok(tasks)
}

fn take(keys: &Keys, read: Vec<(Digest, Key)>, path: &Path) {
    keys.replace(read);
    tracing::info!(keys = keys.count(), file = %path.display(), "keys are known");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        if std::fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0) {
            tracing::warn!(file = %path.display(), "others on this machine may read the file of keys: chmod 600 it");
        }
    }
}

/// Takes every change of the file; what cannot be read changes nothing.
async fn follow(mut changes: Receiver<()>, path: PathBuf, keys: Arc<Keys>) {
    while changes.changed().await.is_ok() {
        if tokio::fs::read(&path).await.is_ok_and(|text| text.trim_ascii().is_empty()) {
            tokio::time::sleep(SECOND_LOOK).await;
        }
        let (file, known) = (path.clone(), keys.clone());
        let taking = tokio::task::spawn_blocking(move || match read(&file) {
            Ok(read) => take(&known, read, &file),
            Err(error) => {
                known.keep();
                tracing::warn!(%error, keys = known.count(), "the keys stay as they were");
            }
        });
        if let Err(error) = taking.await {
            tracing::error!(%error, "the keys stay as they were");
        }
    }
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Vec<(Digest, Key)>, KeysError> {
    let text = std::fs::read_to_string(path).map_err(|why| KeysError::File { path: path.to_owned(), why })?;
    parse(&text, path)
}

/// The file as TOML.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
struct Text {
    keys: BTreeMap<Name, Entry>,
}

/// What stands in the file of one key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry {
    id: Id,
    sha256: Digest,
    models: Option<Models>,
    may: Option<Vec<Rights>>,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    priority: Priority,
    #[serde(default)]
    strict_quant: bool,
    limits: Option<Limits>,
    expires: Option<Expires>,
    #[serde(default)]
    outbound: BTreeMap<String, Secret>,
}

/// What an owner of a key is called: goes into logs and pages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Name(String);

impl TryFrom<String> for Name {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_good = (1..=64).contains(&text.chars().count())
            && text.trim() == text
            && !text.starts_with(PREFIX)
            && !text.chars().any(char::is_control);
        if is_good {
            Ok(Self(text))
        } else {
            Err("the name of a key must be 1 to 64 printable characters, and not a key")
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for Name {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::try_from(text.to_owned())
    }
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Id(String);

impl TryFrom<String> for Id {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_good = (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if is_good {
            Ok(Self(text))
        } else {
            Err("must be 1 to 32 letters and digits: what stands in the key behind olol_")
        }
    }
}

#[derive(Deserialize)]
#[serde(try_from = "Vec<Pattern>")]
struct Models(Vec<Pattern>);

impl TryFrom<Vec<Pattern>> for Models {
    type Error = &'static str;

    fn try_from(models: Vec<Pattern>) -> Result<Self, Self::Error> {
        if models.is_empty() {
            Err("a key for no model is of no use; leave models out to allow all of them")
        } else {
            Ok(Self(models))
        }
    }
}

struct Expires(SystemTime);

impl<'de> Deserialize<'de> for Expires {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        time_of(&Datetime::deserialize(from)?).map(Self).map_err(de::Error::custom)
    }
}

/// A date, or a date and a time; without a zone it is that of Greenwich.
pub(crate) fn time_of(told: &Datetime) -> Result<SystemTime, String> {
    let midnight = toml::value::Time { hour: 0, minute: 0, second: Some(0), nanosecond: None };
    let (date, time) = (told.date.ok_or("a time without a date says nothing")?, told.time.unwrap_or(midnight));
    let offset = told.offset.map_or_else(|| "Z".to_owned(), |offset| offset.to_string());
    let time: jiff::Timestamp =
        format!("{date}T{time}{offset}").parse().map_err(|error: jiff::Error| error.to_string())?;
    Ok(time.into())
}

/// Something that no error repeats.
struct Secret(String);

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from);
        text.map(Self)
            .map_err(|_| de::Error::custom("must be a text: what the server gets as Authorization, or file:PATH"))
    }
}

impl Secret {
    /// The header that a server gets.
    fn header(&self, folder: &Path) -> Result<HeaderValue, String> {
        let text = match self.0.strip_prefix("file:") {
            None => self.0.clone(),
            Some(path) => {
                let path = folder.join(path);
                std::fs::read_to_string(&path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?
            }
        };
        let why = "is no value of a header: it must be one line of printable characters, such as \"Bearer …\"";
        let mut header = HeaderValue::from_str(text.trim()).map_err(|_| why)?;
        header.set_sensitive(true);
        Ok(header)
    }
}

/// Reads the text of a file.
pub(crate) fn parse(text: &str, path: &Path) -> Result<Vec<(Digest, Key)>, KeysError> {
    let wrong = |line, message| KeysError::Syntax { path: path.to_owned(), line, message };
    let file: Text = toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        wrong(line, without_values(error.message()))
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut owners: HashMap<String, &Name> = HashMap::new();
    let mut keys = Vec::new();
    for (name, entry) in &file.keys {
        if let Some(other) = owners.insert(entry.id.0.clone(), name) {
            return Err(wrong(
                None,
                format!("keys '{}' and '{}' have the same id: each needs its own", other.0, name.0),
            ));
        }
        let mut outbound = HashMap::new();
        for (server, secret) in &entry.outbound {
            let header = secret.header(folder);
            let header =
                header.map_err(|why| wrong(None, format!("key '{}': outbound of server '{server}' {why}", name.0)))?;
            outbound.insert(server.as_str().into(), header);
        }
        keys.push((
            entry.sha256,
            Key {
                id: entry.id.0.as_str().into(),
                name: name.0.as_str().into(),
                models: entry.models.as_ref().map(|models| models.0.clone().into()),
                may: entry
                    .may
                    .as_ref()
                    .map_or(Rights::ALL, |words| words.iter().fold(Rights::NONE, |all, more| all.and(*more))),
                admin: entry.admin,
                priority: entry.priority,
                strict_quant: entry.strict_quant,
                limits: entry.limits,
                expires: entry.expires.as_ref().map(|expires| expires.0),
                outbound,
            },
        ));
    }
    Ok(keys)
}

/// A message of the parser without the text that it found instead of what it wanted.
fn without_values(message: &str) -> String {
    match message.split_once("string \"") {
        Some((before, rest)) => format!("{before}string{}", rest.rsplit_once('"').map_or("", |(_, behind)| behind)),
        None => message.to_owned(),
    }
}

/// A key to be made.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// The models that it may use; none: all.
    pub models: Vec<Pattern>,
    /// What it may do, in words; `None`: everything.
    pub may: Option<Vec<String>>,
    /// Whether it is an admin's.
    pub admin: bool,
    /// Who is served first.
    pub priority: Priority,
    /// Whether it gets no other quantization of a model than it asks for.
    pub strict_quant: bool,
    /// What it may use.
    pub limits: Limits,
    /// When it ends.
    pub expires: Option<Datetime>,
}

/// Makes a key, and returns its text: the only time that anybody sees it.
pub fn add(path: &Path, name: &Name, order: &Order) -> anyhow::Result<String> {
    let mut made = String::new();
    edit(path, |document, known| {
        if known.iter().any(|key| *key.name == name.0) {
            bail!("there is a key '{}' already; `olol keys remove {}` removes it", name.0, name.0);
        }
        let id = loop {
            let id = random::<ID>()?;
            if known.iter().all(|key| *key.id != *id) {
                break id;
            }
        };
        made = format!("{PREFIX}{id}_{}", random::<SECRET>()?);
        let implicit = || {
            let mut table = Table::new();
            table.set_implicit(true);
            Item::Table(table)
        };
        let mut table = order.table(&id, Digest::of(made.as_bytes()));
        // At the end, and so behind the comment that stands there.
        let comment = document.trailing().as_str().unwrap_or_default().trim();
        let gap = if document.as_table().is_empty() { "" } else { "\n" };
        let prefix = if comment.is_empty() { gap.to_owned() } else { format!("{gap}{comment}\n\n") };
        table.decor_mut().set_prefix(prefix);
        document.set_trailing("");
        let keys = document.entry("keys").or_insert_with(implicit).as_table_mut();
        let keys = keys.context("write each key as a table of its own, [keys.NAME], so that one can be added")?;
        keys.insert(&name.0, Item::Table(table));
        Ok(())
    })?;
    Ok(made)
}

/// Removes a key by its name or its id, and returns its name.
pub fn remove(path: &Path, which: &str) -> anyhow::Result<Arc<str>> {
    let mut removed = None;
    edit(path, |document, known| {
        let found = known.iter().find(|key| *key.name == *which).or(known.iter().find(|key| *key.id == *which));
        let name =
            &found.with_context(|| format!("there is no key '{which}'; `olol keys list` tells which there are"))?.name;
        let keys = document.get_mut("keys").and_then(Item::as_table_like_mut).context("the file has no keys")?;
        let item = keys.remove(name);
        let comment = item.as_ref().and_then(Item::as_table).map(about_the_file).unwrap_or_default();
        give_back(document, &comment);
        removed = Some(name.clone());
        Ok(())
    })?;
    removed.context("nothing was removed")
}

impl Order {
    /// What stands in the file.
    fn table(&self, id: &str, digest: Digest) -> Table {
        let list = |words: Vec<String>| value(toml_edit::Array::from_iter(words));
        let mut table = Table::new();
        table["id"] = value(id);
        table["sha256"] = value(digest.to_string());
        if !self.models.is_empty() {
            table["models"] = list(self.models.iter().map(ToString::to_string).collect());
        }
        if let Some(may) = &self.may {
            table["may"] = list(may.clone());
        }
        if self.admin {
            table["admin"] = value(true);
        }
        if self.priority != Priority::default() {
            table["priority"] = value(self.priority.as_str());
        }
        if self.strict_quant {
            table["strict-quant"] = value(true);
        }
        if let Some(expires) = self.expires {
            table["expires"] = value(expires);
        }
        let limits = &self.limits;
        let counts = [
            ("requests-per-minute", limits.requests_per_minute.map(|count| u64::from(count.get()))),
            ("burst", limits.burst.map(|count| u64::from(count.get()))),
            ("concurrent", limits.concurrent.map(|count| u64::from(count.get()))),
            ("tokens-per-minute", limits.tokens_per_minute.map(std::num::NonZero::get)),
            ("tokens-per-day", limits.tokens_per_day.map(std::num::NonZero::get)),
        ];
        let mut limits = Table::new();
        for (word, count) in counts {
            if let Some(count) = count.and_then(|count| i64::try_from(count).ok()) {
                limits[word] = value(count);
            }
        }
        if !limits.is_empty() {
            table["limits"] = Item::Table(limits);
        }
        table
    }
}

/// Random bytes of the system in hexadecimal digits.
pub(crate) fn random<const N: usize>() -> anyhow::Result<String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("the system has no random numbers: {error}"))?;
    Ok(bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect())
}

/// The comment before a table without its last paragraph: that is about the table, and what comes before is about the file.
fn about_the_file(table: &Table) -> String {
    let comment = table.decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default();
    comment
        .rsplit_once("\n\n")
        .map(|(before, _)| format!("{}\n\n", before.trim_end()))
        .filter(|text| text.contains('#'))
        .unwrap_or_default()
}

/// Puts a comment before the first key that is left, or at the end if none is.
fn give_back(document: &mut DocumentMut, comment: &str) {
    if comment.is_empty() {
        return;
    }
    let keys = document.get_mut("keys").and_then(Item::as_table_mut);
    let tables = keys.into_iter().flat_map(|keys| keys.iter_mut()).filter_map(|(_, item)| item.as_table_mut());
    if let Some(table) = tables.min_by_key(|table| table.position()) {
        let own = table.decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default();
        let both = format!("{comment}{}", own.trim_start_matches('\n'));
        table.decor_mut().set_prefix(both);
    } else {
        let both = format!("{comment}{}", document.trailing().as_str().unwrap_or_default());
        document.set_trailing(both);
    }
}

/// Changes a file in one step, whatever else happens: nobody ever reads half of it, or sees it with wider rights.
fn edit(path: &Path, change: impl FnOnce(&mut DocumentMut, &[Key]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let folder = files::folder_of(path);
    files::make_private(folder).with_context(|| format!("the folder {} cannot be made", folder.display()))?;
    let _one_at_a_time = lock(folder)?;
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => HEADER.to_owned(),
        read => read.map_err(|why| KeysError::File { path: path.clone(), why })?,
    };
    let known: Vec<Key> = parse(&text, path)?.into_iter().map(|(_, key)| key).collect();
    let mut document: DocumentMut = text.parse().context("the file of keys cannot be changed")?;
    change(&mut document, &known)?;
    let mut text = document.to_string();
    if text.trim().is_empty() {
        HEADER.clone_into(&mut text);
    }
    parse(&text, path)?;
    files::replace(path, &text).with_context(|| format!("{} cannot be written", path.display()))
}

/// Keeps others who would change a file of this folder waiting, until it is dropped.
#[cfg(unix)]
fn lock(folder: &Path) -> anyhow::Result<std::fs::File> {
    let opened = std::fs::File::open(folder)?;
    rustix::fs::flock(&opened, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(opened)
}

#[cfg(not(unix))]
fn lock(_folder: &Path) -> anyhow::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn wrong(text: &str) -> String {
        parse(text, Path::new("keys.toml")).map(drop).unwrap_err().to_string()
    }

    fn one(more: &str) -> String {
        format!("[keys.ada]\nid = \"a1\"\nsha256 = \"{DIGEST}\"\n{more}")
    }

    #[test]
    fn a_key_may_have_all_of_this() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "Bearer two\n").unwrap();
        let text =
            one("models = [\"tiny*\", \"Llama3\"]\nmay = [\"infer\", \"list\"]\nadmin = true\npriority = \"high\"\n\
             expires = 2027-01-31\noutbound = { a = \"Bearer one\", b = \"file:token\" }\n\
             [keys.ada.limits]\nrequests-per-minute = 60\n");
        let (_, key) = parse(&text, &folder.path().join("keys.toml")).unwrap().remove(0);
        assert_eq!((&*key.name, &*key.id, key.admin, key.priority), ("ada", "a1", true, Priority::High));
        assert!(key.may_use("tiny:1b") && key.may_use("llama3:latest") && !key.may_use("other"));
        assert_eq!(key.may, Rights::INFER.and(Rights::LIST));
        assert_eq!(key.limits.unwrap().requests_per_minute.unwrap().get(), 60);
        assert_eq!(key.expires.unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs(), 1_801_353_600);
        assert_eq!(
            (&key.outbound["a"], &key.outbound["b"]),
            (&"Bearer one".parse().unwrap(), &"Bearer two".parse().unwrap())
        );
        assert!(!format!("{key:?}").contains("Bearer"), "{key:?}");
    }

    #[test]
    fn a_key_without_more_may_do_everything_but_be_an_admin() {
        let (_, key) = parse(&one(""), Path::new("keys.toml")).unwrap().remove(0);
        assert!(key.may_use("anything") && key.may == Rights::ALL && !key.admin && key.expires.is_none());
        let (_, key) = parse(&one("may = []\n"), Path::new("keys.toml")).unwrap().remove(0);
        assert_eq!(key.may, Rights::NONE);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line_and_without_its_value() {
        for (text, line, says) in [
            (one("modles = []"), "line 4", "unknown field `modles`"),
            (one("may = [\"dance\"]"), "line 4", "'dance' is nothing that a key may do"),
            (one("models = []"), "line 4", "leave models out"),
            (one("models = [\"\"]"), "line 4", "must not be empty"),
            (one("priority = \"urgent\""), "line 4", "unknown variant `urgent`"),
            (one("expires = 12:00:00"), "line 4", "without a date"),
            (one("expires = \"s3cret\""), "line 4", "invalid type: string, expected"),
            (one("outbound = \"Bearer s3cret\""), "line 4", "invalid type: string, expected"),
            (one("outbound.gpu1 = [\"s3cret\"]"), "line 4", "must be a text"),
            (
                one("outbound.gpu1 = \"Bearer s3cret\\n\\u0007\""),
                "",
                "outbound of server 'gpu1' is no value of a header",
            ),
            (one("outbound.gpu1 = \"file:/nowhere/token\""), "", "/nowhere/token cannot be read"),
            (one("outbound.gpu1 = Bearer s3cret"), "line 4", ""),
            (one("[keys.ada]\n"), "line 4", "duplicate key"),
            (
                one("[keys.bob]\nid = \"a1\"\nsha256 = \"").replace("ada]", "ada]\n") + DIGEST + "\"",
                "",
                "'ada' and 'bob' have the same id",
            ),
            (
                "[keys.ada]\nid = \"a1\"\nsha256 = \"olol_a1_s3cret\"\n".to_owned(),
                "line 3",
                "must be 64 hexadecimal digits",
            ),
            ("[keys.ada]\nid = \"olol_a1_s3cret\"\n".to_owned(), "line 2", "letters and digits"),
            ("[keys.ada]\nid = \"a1\"\n".to_owned(), "line 1", "missing field `sha256`"),
            ("[keys.\"\\u0007\"]\n".to_owned(), "", "printable characters"),
            ("[kyes.ada]\n".to_owned(), "line 1", "unknown field `kyes`"),
        ] {
            let error = wrong(&text);
            assert!(
                error.starts_with("keys.toml: ") && error.contains(line) && error.contains(says),
                "{text}\n{error}"
            );
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn keys_come_and_go_and_the_rest_of_the_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/keys.toml");
        let (ada, bob) = ("ada".parse().unwrap(), "bob b".parse().unwrap());
        let text = add(&path, &ada, &Order::default()).unwrap();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert!(kept.starts_with(HEADER) && !kept.contains(&text), "{kept}");
        let (digest, key) = read(&path).unwrap().remove(0);
        assert_eq!(digest.to_string(), Digest::of(text.as_bytes()).to_string());
        assert!(text.starts_with(&format!("olol_{}_", key.id)) && text.len() == 54);
        std::fs::write(&path, kept.replace("[keys.ada]", "# Ada is on the second floor.\n[keys.ada]")).unwrap();
        let limits = Limits { requests_per_minute: std::num::NonZero::new(9), ..Limits::default() };
        let order = Order {
            models: vec![Pattern::parse("tiny*").unwrap()],
            may: Some(vec!["infer".to_owned()]),
            admin: true,
            priority: Priority::Low,
            strict_quant: true,
            limits,
            expires: Some("2027-01-31".parse().unwrap()),
        };
        assert_ne!(add(&path, &bob, &order).unwrap(), text);
        let kept = std::fs::read_to_string(&path).unwrap();
        assert!(kept.contains("second floor") && kept.contains("[keys.\"bob b\".limits]"), "{kept}");
        assert!(read(&path).unwrap().iter().any(|(_, key)| &*key.name == "bob b" && key.strict_quant), "{kept}");
        let error = add(&path, &bob, &order).unwrap_err().to_string();
        assert!(error.contains("there is a key 'bob b' already"), "{error}");
        assert_eq!(&*remove(&path, &key.id).unwrap(), "ada");
        let kept = std::fs::read_to_string(&path).unwrap();
        assert!(kept.starts_with(HEADER) && kept.contains("[keys.\"bob b\"]") && !kept.contains("floor"), "{kept}");
        remove(&path, "bob b").unwrap();
        assert!(read(&path).unwrap().is_empty() && std::fs::read_to_string(&path).unwrap().starts_with(HEADER));
        assert!(remove(&path, "bob b").unwrap_err().to_string().contains("there is no key 'bob b'"));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left over");
    }

    #[cfg(unix)]
    #[test]
    fn only_its_owner_may_read_the_file_even_behind_a_link() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("new/keys.toml"), folder.path().join("link"));
        add(&path, &"ada".parse().unwrap(), &Order::default()).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        add(&link, &"bob".parse().unwrap(), &Order::default()).unwrap();
        let mode = |path: &Path| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap()), read(&path).unwrap().len()), (0o600, 0o700, 2));
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_wrong_file_is_not_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        std::fs::write(&path, "[keys.ada]\nid = 1\n").unwrap();
        assert!(add(&path, &"bob".parse().unwrap(), &Order::default()).unwrap_err().to_string().contains("line 2"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[keys.ada]\nid = 1\n");
    }

    #[test]
    fn keys_made_at_the_same_time_are_all_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        std::thread::scope(|scope| {
            for at in 0..8 {
                let (path, name) = (&path, format!("key{at}").parse().unwrap());
                scope.spawn(move || add(path, &name, &Order::default()).unwrap());
            }
        });
        assert_eq!(read(&path).unwrap().len(), 8);
    }
}
