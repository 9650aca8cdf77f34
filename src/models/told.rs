//! The progress of many servers, told as that of one Ollama.
//!
//! A client sees what one Ollama says, one step after the other: the manifest, each layer from nothing to all of it, the check,
//! and at the end `success` or an error. How far all are together in their layers is the mean of the servers: with two of three
//! that have all of it, two thirds. What comes behind a layer is told when all have come so far. Nothing that was told is taken
//! back, also not when a server fails and no longer counts.

use bytes::Bytes;
use olol_middleware::ServerId;
use serde_json::{Map, Value};

use super::Line;

/// Steps that are remembered; more are in no pull and no create.
const MOST: usize = 10_000;

/// How far each server is.
#[derive(Clone, Debug, Default)]
pub struct Board {
    /// In the order in which they were first heard of.
    steps: Vec<Step>,
    courses: Vec<Course>,
}

#[derive(Clone, Debug)]
struct Step {
    status: String,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    /// Only words: the line as a server said it.
    Words(Bytes),
    /// A layer of so many bytes.
    Layer { digest: String, total: u64 },
}

impl Step {
    fn total(&self) -> u64 {
        match self.what {
            What::Words(_) => 0,
            What::Layer { total, .. } => total,
        }
    }

    /// Whether a line is about it.
    fn fits(&self, line: &Line) -> bool {
        match &self.what {
            What::Words(_) => line.digest.is_empty() && self.status == line.status,
            What::Layer { digest, .. } => *digest == line.digest,
        }
    }
}

/// How far one server is.
#[derive(Clone, Debug)]
struct Course {
    /// Bytes of each step that are there.
    done: Vec<u64>,
    /// How many of the steps it has come to.
    reached: usize,
    is_over: bool,
    counts: bool,
}

impl Board {
    /// One server more; returns its number.
    pub fn add(&mut self) -> usize {
        self.courses.push(Course { done: Vec::new(), reached: 0, is_over: false, counts: true });
        self.courses.len() - 1
    }

    /// A server said something that is neither its last word nor an error; `raw` in so many bytes.
    pub fn hear(&mut self, server: usize, line: &Line, raw: Option<&Bytes>) {
        if line.digest.is_empty() && line.status.is_empty() {
            return;
        }
        let at = match self.steps.iter().position(|step| step.fits(line)) {
            Some(at) => at,
            None if self.steps.len() >= MOST || self.is_late(server, line) => return,
            None => {
                self.steps.push(Step { status: line.status.clone(), what: What::of(line, raw) });
                self.steps.len() - 1
            }
        };
        let total = self.steps[at].total();
        let Some(course) = self.courses.get_mut(server) else { return };
        course.reached = course.reached.max(at + 1);
        course.done.resize(course.done.len().max(at + 1), 0);
        course.done[at] = course.done[at].max(line.completed.min(total));
    }

    /// Whether a line is about a layer that had its place before what others have said since: they had it so soon that they
    /// never told of it.
    fn is_late(&self, server: usize, line: &Line) -> bool {
        let is_behind = self.courses.get(server).is_some_and(|course| course.reached < self.steps.len());
        let is_over = matches!(self.steps.last(), Some(Step { what: What::Words(_), .. }))
            && self.steps.iter().any(|step| matches!(step.what, What::Layer { .. }));
        !line.digest.is_empty() && is_behind && is_over
    }

    /// A server has all of it.
    pub fn finish(&mut self, server: usize) {
        if let Some(course) = self.courses.get_mut(server) {
            course.is_over = true;
        }
    }

    /// A server does not count any more.
    pub fn drop_out(&mut self, server: usize) {
        if let Some(course) = self.courses.get_mut(server) {
            course.counts = false;
        }
    }

    /// A server begins anew, in another way; what it has so far, it has.
    pub fn begin_again(&mut self, server: usize) {
        if let Some(course) = self.courses.get_mut(server) {
            course.reached = 0;
        }
    }

    /// The servers that are not done yet, by number, and the share of it that each has.
    pub fn under_way(&self) -> impl Iterator<Item = (usize, f32)> {
        let all = self.bytes(self.steps.len());
        let is_under_way = |(_, course): &(usize, &Course)| course.counts && !course.is_over;
        self.courses
            .iter()
            .enumerate()
            .filter(is_under_way)
            .map(move |(at, course)| (at, share(course.done.iter().sum(), all)))
    }

    fn counting(&self) -> impl Iterator<Item = &Course> {
        self.courses.iter().filter(|course| course.counts)
    }

    /// Bytes of so many steps.
    fn bytes(&self, steps: usize) -> u64 {
        self.steps.iter().take(steps).fold(0, |sum, step| sum.saturating_add(step.total()))
    }

    /// Bytes that are there in the mean.
    fn mean(&self) -> u64 {
        let all = self.bytes(self.steps.len());
        let of = |course: &Course| if course.is_over { all } else { course.done.iter().sum::<u64>().min(all) };
        let (mut sum, mut count) = (0_u128, 0_u128);
        for course in self.counting() {
            sum += u128::from(of(course));
            count += 1;
        }
        u64::try_from(sum / count.max(1)).unwrap_or(all)
    }

    /// How many of the steps all servers have come to.
    fn reached(&self) -> usize {
        let of = |course: &Course| if course.is_over { self.steps.len() } else { course.reached };
        self.counting().map(of).min().unwrap_or(0)
    }
}

impl What {
    fn of(line: &Line, raw: Option<&Bytes>) -> Self {
        if line.digest.is_empty() {
            let again = || Bytes::from(format!("{}\n", serde_json::json!({ "status": line.status })));
            Self::Words(raw.cloned().unwrap_or_else(again))
        } else {
            Self::Layer { digest: line.digest.clone(), total: line.total }
        }
    }
}

#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a share")]
fn share(part: u64, whole: u64) -> f32 {
    if whole == 0 { 0.0 } else { (part as f64 / whole as f64).min(1.0) as f32 }
}

/// What one client has been told.
#[derive(Clone, Debug, Default)]
pub struct Telling {
    /// The step that is next.
    step: usize,
    /// How much of it was told, if it is a layer; `None`: nothing yet.
    completed: Option<u64>,
    /// Whether a layer was told of: what comes before the first one, all do alike.
    is_behind_layers: bool,
}

impl Telling {
    /// The lines that are news to it.
    pub fn news(&mut self, board: &Board) -> Vec<Bytes> {
        let mut lines = Vec::new();
        let (there, reached) = (board.mean(), board.reached());
        let mut start = board.bytes(self.step);
        while let Some(step) = board.steps.get(self.step) {
            match &step.what {
                What::Words(_) if self.is_behind_layers && self.step >= reached => break,
                What::Words(line) => lines.push(line.clone()),
                What::Layer { digest, total } => {
                    let end = start.saturating_add(*total);
                    let completed = there.clamp(start, end) - start;
                    if self.completed.is_none_or(|told| told < completed) {
                        lines.push(layer_line(&step.status, digest, *total, completed));
                    }
                    (self.completed, self.is_behind_layers) = (self.completed.max(Some(completed)), true);
                    if there < end {
                        break;
                    }
                    start = end;
                }
            }
            (self.step, self.completed) = (self.step + 1, None);
        }
        lines
    }
}

/// A line about a layer as Ollama writes it.
fn layer_line(status: &str, digest: &str, total: u64, completed: u64) -> Bytes {
    let mut members = Map::new();
    members.insert("status".to_owned(), status.into());
    members.insert("digest".to_owned(), digest.into());
    for (key, value) in [("total", total), ("completed", completed)] {
        if value > 0 {
            members.insert(key.to_owned(), value.into());
        }
    }
    format!("{}\n", Value::Object(members)).into()
}

/// Why it did not become what was wanted: all who failed by name, or one server's own words where all of them failed.
pub fn failure(failed: &[(ServerId, String)], all_failed: bool) -> String {
    match failed {
        [] => "a server ended without success".to_owned(),
        [(told, why), others @ ..] if all_failed => {
            for (server, why) in others {
                tracing::debug!(%server, why, %told, "all servers failed");
            }
            why.clone()
        }
        _ => failed.iter().map(named).collect::<Vec<_>>().join("; "),
    }
}

/// What failed at a server, with its name; errors of ours have it in them.
fn named((id, why): &(ServerId, String)) -> String {
    if why.starts_with(&format!("server {id} ")) { why.clone() } else { format!("server {id}: {why}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(digest: &str, total: u64, completed: u64) -> Line {
        Line { status: format!("pulling {digest}"), digest: digest.to_owned(), total, completed, error: None }
    }

    fn status(text: &str) -> Line {
        Line { status: text.to_owned(), ..Line::default() }
    }

    fn texts(lines: &[Bytes]) -> Vec<String> {
        let text = |line: &Bytes| {
            let value: Value = serde_json::from_slice(line).unwrap();
            match value["digest"].as_str() {
                Some(digest) => format!("{digest} {}/{}", value["completed"].as_u64().unwrap_or(0), value["total"]),
                None => value["status"].as_str().unwrap().to_owned(),
            }
        };
        lines.iter().map(text).collect()
    }

    #[test]
    fn one_server_is_told_as_it_speaks() {
        let (mut board, mut telling) = (Board::default(), Telling::default());
        let one = board.add();
        let mut out = Vec::new();
        for line in [
            status("pulling manifest"),
            layer("a", 100, 0),
            layer("a", 100, 60),
            layer("a", 100, 100),
            layer("b", 10, 10),
            status("verifying sha256 digest"),
            status("writing manifest"),
        ] {
            board.hear(one, &line, None);
            out.extend(texts(&telling.news(&board)));
        }
        let wanted = [
            "pulling manifest",
            "a 0/100",
            "a 60/100",
            "a 100/100",
            "b 10/10",
            "verifying sha256 digest",
            "writing manifest",
        ];
        assert_eq!(out, wanted);
    }

    #[test]
    fn a_copy_after_a_pull_goes_on_where_the_pull_has_ended() {
        let (mut board, mut telling) = (Board::default(), Telling::default());
        let [one, two] = [board.add(), board.add()];
        let mut out = Vec::new();
        let mut said = |board: &mut Board, server, line: Line| {
            board.hear(server, &line, None);
            out.extend(texts(&telling.news(board)));
            out.len()
        };
        said(&mut board, one, status("pulling manifest"));
        said(&mut board, one, layer("a", 100, 50));
        said(&mut board, one, layer("a", 100, 100));
        said(&mut board, one, layer("b", 20, 20));
        said(&mut board, one, status("verifying sha256 digest"));
        board.finish(one);
        said(&mut board, two, status("pulling manifest"));
        said(&mut board, two, layer("a", 100, 100));
        said(&mut board, two, layer("b", 20, 20));
        said(&mut board, two, status("verifying sha256 digest"));
        let wanted = [
            "pulling manifest",
            "a 25/100",
            "a 50/100",
            "a 60/100",
            "a 100/100",
            "b 10/20",
            "b 20/20",
            "verifying sha256 digest",
        ];
        assert_eq!(out, wanted);
    }

    #[test]
    fn what_was_told_is_not_taken_back() {
        let (mut board, mut telling) = (Board::default(), Telling::default());
        let [one, two] = [board.add(), board.add()];
        board.hear(one, &layer("a", 100, 100), None);
        assert_eq!(texts(&telling.news(&board)), ["a 50/100"]);
        board.drop_out(one);
        board.hear(two, &layer("a", 100, 10), None);
        assert!(telling.news(&board).is_empty());
        board.hear(two, &layer("a", 100, 70), None);
        assert_eq!(texts(&telling.news(&board)), ["a 70/100"]);
        board.hear(two, &layer("a", 100, 5), None);
        assert!(telling.news(&board).is_empty(), "nor does a server go back");
        board.finish(two);
        assert_eq!(texts(&telling.news(&board)), ["a 100/100"]);
    }

    #[test]
    fn who_comes_late_is_told_the_whole() {
        let mut board = Board::default();
        let one = board.add();
        for line in [status("pulling manifest"), layer("a", 100, 100), layer("b", 10, 3)] {
            board.hear(one, &line, None);
        }
        assert_eq!(texts(&Telling::default().news(&board)), ["pulling manifest", "a 100/100", "b 3/10"]);
    }

    #[test]
    fn what_stands_between_layers_is_told_in_its_place() {
        let (mut board, mut telling) = (Board::default(), Telling::default());
        let [one, two] = [board.add(), board.add()];
        let mut out = Vec::new();
        for (server, line) in [
            (one, status("parsing GGUF")),
            (one, layer("q", 100, 50)),
            (two, status("parsing GGUF")),
            (one, layer("q", 100, 100)),
            (one, status("creating new layer")),
            (two, layer("q", 100, 100)),
            (two, status("creating new layer")),
            (one, layer("r", 10, 10)),
            (two, layer("r", 10, 10)),
        ] {
            board.hear(server, &line, None);
            out.extend(texts(&telling.news(&board)));
        }
        let wanted = ["parsing GGUF", "q 25/100", "q 50/100", "q 100/100", "creating new layer", "r 5/10", "r 10/10"];
        assert_eq!(out, wanted);
    }

    #[test]
    fn a_layer_that_the_first_had_too_soon_to_tell_of_is_not_told_behind_the_check() {
        let (mut board, mut telling) = (Board::default(), Telling::default());
        let [one, two] = [board.add(), board.add()];
        let mut out = Vec::new();
        for (server, line) in [
            (one, layer("a", 100, 100)),
            (one, status("verifying sha256 digest")),
            (two, layer("a", 100, 100)),
            (two, layer("config", 10, 10)),
            (two, status("verifying sha256 digest")),
        ] {
            board.hear(server, &line, None);
            out.extend(texts(&telling.news(&board)));
        }
        assert_eq!(out, ["a 50/100", "a 100/100", "verifying sha256 digest"]);
    }

    #[test]
    fn one_who_fails_holds_nobody_up() {
        let (mut board, mut telling) = (Board::default(), Telling::default());
        let [one, two] = [board.add(), board.add()];
        for (server, line) in
            [(one, layer("a", 100, 100)), (two, layer("a", 100, 20)), (one, status("writing manifest"))]
        {
            board.hear(server, &line, None);
        }
        assert_eq!(texts(&telling.news(&board)), ["a 60/100"]);
        board.drop_out(two);
        assert_eq!(texts(&telling.news(&board)), ["a 100/100", "writing manifest"]);
    }

    #[test]
    fn who_failed_is_named_unless_all_did() {
        let failed = [(ServerId::new("a"), "disk full".to_owned()), (ServerId::new("b"), "server b failed".to_owned())];
        assert_eq!(failure(&failed, false), "server a: disk full; server b failed");
        assert_eq!(failure(&failed, true), "disk full");
    }
}
