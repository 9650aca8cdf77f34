//! The token of a cluster: a secret that its machines share, and that whoever calls an agent must show.
//!
//! The first command that needs one makes it, in the user's configuration folder, where all commands of that user find it.
//! Nothing here ever shows it but [`Token::reveal`].

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use http::{HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::files;
use crate::keys::random;

/// The header, and the metadata of a gRPC call, that shows the token. No client needs it: clients have keys.
pub const HEADER: &str = "olol-token";
/// The variable of the environment that may hold the token, or several with spaces or commas between.
pub const VARIABLE: &str = "OLOL_TOKEN";
/// Random bytes of a token that we make: 256 bits.
const BYTES: usize = 32;
/// The most tokens that a file may have.
pub const MOST: usize = 4;
/// The shortest and the longest token that is taken, characters.
const LENGTHS: std::ops::RangeInclusive<usize> = 32..=512;

/// The token of a cluster. It cannot be shown by accident.
#[derive(Clone)]
pub struct Token(HeaderValue);

/// A token that cannot be used. No message repeats any of it.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It is not what a token can be.
    #[error("{place}: {what}")]
    Wrong {
        /// Where it was given.
        place: String,
        /// What is wrong with it, and how to mend it.
        what: String,
    },
    /// Its file cannot be read.
    #[error("the token of the cluster cannot be read from {path}: {why}; `olol token` on another machine prints it", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why. It stands in the message, and so is no source.
        why: io::Error,
    },
    /// Its file cannot be written.
    #[error("the token of the cluster cannot be written to {path}: {why}; set OLOL_TOKEN, or name a file that holds it with --token-file", path = path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// Why. It stands in the message, and so is no source.
        why: io::Error,
    },
    /// There is no place for it.
    #[error(
        "there is no home folder to keep the token of the cluster in; set OLOL_TOKEN, or name a file that holds it with --token-file"
    )]
    NoFolder,
    /// The system has no random numbers.
    #[error("no token can be made: {0}")]
    NoRandom(anyhow::Error),
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if !LENGTHS.contains(&text.len()) {
            return Err(format!(
                "a token has {} to {} characters, and this one has {}; `olol token` prints a good one",
                LENGTHS.start(),
                LENGTHS.end(),
                text.len()
            ));
        }
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
        let header = text.bytes().all(is_good).then(|| HeaderValue::from_str(text).ok()).flatten();
        let mut header = header.ok_or_else(|| {
            "a token is of letters, digits and - . _ ~ + / = alone; `olol token` prints a good one".to_owned()
        })?;
        header.set_sensitive(true);
        Ok(Self(header))
    }
}

impl Token {
    /// A new one.
    pub fn make() -> Result<Self, TokenError> {
        let text = random::<BYTES>().map_err(TokenError::NoRandom)?;
        text.parse().map_err(|what| TokenError::Wrong { place: "a new token".to_owned(), what })
    }

    /// The token as text: for whoever asked to see it, and for its file.
    pub fn reveal(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    /// What stands in its file.
    fn line(&self) -> String {
        format!("{}\n", self.reveal())
    }

    /// The header that shows it.
    pub fn header(&self) -> HeaderValue {
        self.0.clone()
    }

    /// Whether a call shows it. How long this takes tells nothing of it, not even its length.
    pub fn is_shown(&self, headers: &HeaderMap) -> bool {
        let mut shown = headers.get_all(HEADER).iter();
        let (Some(shown), None) = (shown.next(), shown.next()) else { return false };
        self.is(shown.as_bytes())
    }

    /// A number that only who has the token can tell, another for every purpose.
    pub fn number(&self, purpose: &[u8]) -> u64 {
        let digest = Sha256::new().chain_update(purpose).chain_update([0]).chain_update(self.0.as_bytes()).finalize();
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[..8]);
        u64::from_le_bytes(bytes)
    }

    fn is(&self, other: &[u8]) -> bool {
        Sha256::digest(self.0.as_bytes()).as_slice().ct_eq(Sha256::digest(other).as_slice()).into()
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.is(other.0.as_bytes())
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// The tokens that `OLOL_TOKEN` gives, the one that is shown first; none, if it is not set.
pub fn of_environment() -> Result<Vec<Token>, TokenError> {
    let Some(text) = std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) else { return Ok(Vec::new()) };
    let wrong = |what| TokenError::Wrong { place: format!("environment variable {VARIABLE}"), what };
    several(&text.to_string_lossy()).map_err(wrong)
}

/// The tokens of a text with spaces or commas between them: at least one.
fn several(text: &str) -> Result<Vec<Token>, String> {
    let parts = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|part| !part.is_empty());
    let all = parts.map(str::parse).collect::<Result<Vec<Token>, _>>()?;
    match all.len() {
        0 => Err("there is no token in it; `olol token` prints a good one".to_owned()),
        1..=MOST => Ok(all),
        count => Err(format!("it has {count} tokens, and may have {MOST}, with spaces or commas between")),
    }
}

/// The file of the user's configuration folder.
pub fn file() -> Option<PathBuf> {
    crate::config::folder().map(|folder| folder.join("token"))
}

/// The token of the user's configuration folder; it is made if it is not there.
pub fn of_folder() -> Result<Token, TokenError> {
    let path = file().ok_or(TokenError::NoFolder)?;
    match read(&path) {
        Err(TokenError::Unreadable { why, .. }) if why.kind() == io::ErrorKind::NotFound => make(&path),
        read => read.map(first),
    }
}

/// The one that is shown, of those in a file.
pub(super) fn first((first, _): (Token, Vec<Token>)) -> Token {
    first
}

/// The token in a file, which nobody else on this machine may read, and others in further lines, which count as well.
pub fn read(path: &Path) -> Result<(Token, Vec<Token>), TokenError> {
    let unreadable = |why| TokenError::Unreadable { path: path.to_owned(), why };
    let wrong = |what: String| TokenError::Wrong { place: path.display().to_string(), what };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = file.metadata().map_err(unreadable)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(wrong(format!(
                "others on this machine may use this token (mode {:03o}): chmod 600 it, or give the token with OLOL_TOKEN",
                mode & 0o777
            )));
        }
    }
    let mut text = String::new();
    // More than all tokens, and not all of what may be there.
    file.take(4096).read_to_string(&mut text).map_err(unreadable)?;
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let first = lines.next().unwrap_or_default().parse().map_err(&wrong)?;
    let others = lines.map(str::parse).collect::<Result<Vec<Token>, _>>().map_err(&wrong)?;
    if others.len() >= MOST {
        return Err(wrong(format!("it has {} tokens, and may have {MOST}, a line each", others.len() + 1)));
    }
    Ok((first, others))
}

/// Makes the token of a file that is not there. Of several commands that do so at once, one wins, and all have its token.
fn make(path: &Path) -> Result<Token, TokenError> {
    let token = Token::make()?;
    match files::put(path, &token.line()) {
        Ok(true) => {
            tracing::info!(file = %path.display(), "a token for the cluster was made; `olol token` prints it for other machines");
            Ok(token)
        }
        Ok(false) => read(path).map(first),
        Err(why) => Err(TokenError::Unwritable { path: path.to_owned(), why }),
    }
}

/// Makes a new token in the place of that of a file.
pub fn rotate(path: &Path) -> Result<Token, TokenError> {
    let token = Token::make()?;
    files::replace(path, &token.line()).map_err(|why| TokenError::Unwritable { path: path.to_owned(), why })?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> String {
        text.parse::<Token>().unwrap_err()
    }

    fn shown(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (http::HeaderName::from_static(HEADER), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_new_token_is_long_and_another_every_time() {
        let (one, other) = (Token::make().unwrap(), Token::make().unwrap());
        assert_eq!(one.reveal().len(), 64);
        assert!(one != other && one == one.reveal().parse().unwrap());
    }

    #[test]
    fn a_token_is_shown_by_the_very_same_and_once() {
        let token: Token = "0123456789abcdef0123456789abcdef".parse().unwrap();
        assert!(token.is_shown(&shown(&["0123456789abcdef0123456789abcdef"])));
        for wrong in [&[][..], &[""], &["0123456789abcdef0123456789abcdeF"], &["0123456789abcdef0123456789abcdef"; 2]] {
            assert!(!token.is_shown(&shown(wrong)), "{wrong:?}");
        }
    }

    #[test]
    fn a_token_is_in_no_debug_text_and_in_no_error() {
        let token = Token::make().unwrap();
        let config = super::super::Config { given: vec![token.clone()], ..Default::default() };
        let shown = format!("{token:?} {config:?} {:?}", token.header());
        assert!(!shown.contains(token.reveal()), "{shown}");
        let bad = format!("{}!", token.reveal());
        assert!(!said(&bad).contains(token.reveal()));
        assert!(!toml::to_string(&config).unwrap().contains(token.reveal()));
    }

    #[test]
    fn what_is_no_token_is_refused_with_a_reason() {
        for (text, why) in
            [("", "has 0"), ("short", "has 5"), (&"a b".repeat(20), "letters, digits"), (&"ä".repeat(20), "letters")]
        {
            let error = said(text);
            assert!(error.contains(why) && error.contains("olol token"), "{text}: {error}");
        }
        assert!(said(&"a".repeat(513)).contains("513"));
    }

    #[test]
    fn tokens_made_at_the_same_time_are_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("token");
        let made: Vec<Token> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| make(&path).unwrap())).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let kept = first(read(&path).unwrap());
        assert!(made.iter().all(|token| *token == kept));
        // And nothing else was left behind.
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(rotate(&path).unwrap() != kept && first(read(&path).unwrap()) != kept);
    }

    #[test]
    fn a_file_may_have_several_and_the_first_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let made: Vec<Token> = (0..=MOST).map(|_| Token::make().unwrap()).collect();
        make(&path).unwrap();
        let put = |tokens: &[Token]| {
            let lines: Vec<&str> = tokens.iter().map(Token::reveal).collect();
            std::fs::write(&path, format!("\n {}\n", lines.join(" \n\n"))).unwrap();
        };
        put(&made[..MOST]);
        assert_eq!(read(&path).unwrap(), (made[0].clone(), made[1..MOST].to_vec()));
        put(&made);
        assert!(read(&path).unwrap_err().to_string().contains("it has 5 tokens, and may have 4"));
        std::fs::write(&path, format!("{}\nshort\n", made[0].reveal())).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("has 5") && !error.contains(made[0].reveal()), "{error}");
    }

    #[test]
    fn the_environment_may_give_several_as_a_file_does() {
        let made: Vec<Token> = (0..=MOST).map(|_| Token::make().unwrap()).collect();
        let words: Vec<&str> = made.iter().map(Token::reveal).collect();
        for between in [",", " ", "\n", " , ", ",\n"] {
            assert_eq!(several(&words[..MOST].join(between)).unwrap(), made[..MOST]);
        }
        assert_eq!(several(&format!(" {},", words[0])).unwrap(), made[..1]);
        assert!(several(&words.join(",")).unwrap_err().contains("it has 5 tokens, and may have 4"));
        let error = several(&format!("{},short", words[0])).unwrap_err();
        assert!(error.contains("has 5") && !error.contains(words[0]), "{error}");
        assert!(several(" , ").unwrap_err().contains("no token"));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = make(&path).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        for open in [0o640, 0o604, 0o620] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(open)).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("chmod 600") && error.contains(&format!("{open:o}")), "{error}");
            assert!(!error.contains(token.reveal()));
        }
    }

    #[test]
    fn a_file_that_is_not_there_or_is_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = read(&folder.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("none") && error.contains("olol token"), "{error}");
        let error = make(Path::new("/dev/null/token")).unwrap_err().to_string();
        assert!(error.contains("cannot be written") && error.contains("OLOL_TOKEN"), "{error}");
    }
}
