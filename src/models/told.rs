//! The progress of many servers, told as that of one Ollama.
//!
//! A client sees what one Ollama says: the manifest, each layer from nothing to all of it, one after the other, the check, and
//! at the end `success` or an error. How far all are together is the mean of the servers: with two of three that have all of
//! it, two thirds. Nothing that was told is taken back, also not when a server fails and no longer counts.

use bytes::Bytes;
use serde_json::{Map, Value};

use super::Line;

/// Layers and statuses that are remembered of one pull; more are in none.
const MOST: usize = 10_000;

/// How far each server is.
#[derive(Clone, Debug, Default)]
pub struct Board {
    layers: Vec<Layer>,
    /// What is said before the layers, and after them.
    head: Vec<Said>,
    tail: Vec<Said>,
    courses: Vec<Course>,
}

#[derive(Clone, Debug)]
struct Layer {
    digest: String,
    status: String,
    total: u64,
}

/// A line as a server said it.
#[derive(Clone, Debug)]
struct Said {
    status: String,
    line: Bytes,
}

/// How far one server is.
#[derive(Clone, Debug)]
struct Course {
    /// Bytes of each layer that are there.
    done: Vec<u64>,
    /// How many of the last statuses it has reached.
    tail: usize,
    is_over: bool,
    counts: bool,
}

impl Board {
    /// One server more; returns its number.
    pub fn add(&mut self) -> usize {
        self.courses.push(Course { done: Vec::new(), tail: 0, is_over: false, counts: true });
        self.courses.len() - 1
    }

    /// A server said something that is neither its last word nor an error.
    pub fn hear(&mut self, server: usize, line: &Line, raw: Option<&Bytes>) {
        if !line.digest.is_empty() {
            self.hear_of_layer(server, line);
            return;
        }
        if line.status.is_empty() {
            return;
        }
        let said = if line.status.starts_with("pulling") { &mut self.head } else { &mut self.tail };
        let known = said.iter().position(|known| known.status == line.status);
        let at = match known {
            Some(at) => at,
            None if said.len() >= MOST => return,
            None => {
                let line_again = || Bytes::from(format!("{}\n", status_line(&line.status)));
                said.push(Said { status: line.status.clone(), line: raw.cloned().unwrap_or_else(line_again) });
                said.len() - 1
            }
        };
        if let (false, Some(course)) = (line.status.starts_with("pulling"), self.courses.get_mut(server)) {
            course.tail = course.tail.max(at + 1);
        }
    }

    fn hear_of_layer(&mut self, server: usize, line: &Line) {
        let known = self.layers.iter().position(|layer| layer.digest == line.digest);
        let at = match known {
            Some(at) => at,
            None if self.layers.len() >= MOST => return,
            None => {
                let Line { digest, status, total, .. } = line.clone();
                self.layers.push(Layer { digest, status, total });
                self.layers.len() - 1
            }
        };
        let total = self.layers[at].total;
        let Some(course) = self.courses.get_mut(server) else { return };
        course.done.resize(course.done.len().max(at + 1), 0);
        course.done[at] = course.done[at].max(line.completed.min(total));
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
            course.tail = 0;
        }
    }

    /// The servers that are not done yet, by number, and the share of it that each has.
    pub fn under_way(&self) -> impl Iterator<Item = (usize, f32)> {
        let all: u64 = self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.total));
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

    /// Bytes that are there in the mean.
    fn mean(&self) -> u64 {
        let all: u64 = self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.total));
        let of = |course: &Course| if course.is_over { all } else { course.done.iter().sum::<u64>().min(all) };
        let (mut sum, mut count) = (0_u128, 0_u128);
        for course in self.counting() {
            sum += u128::from(of(course));
            count += 1;
        }
        u64::try_from(sum / count.max(1)).unwrap_or(all)
    }

    /// How many of the last statuses are true of all servers.
    fn reached(&self) -> usize {
        let of = |course: &Course| if course.is_over { self.tail.len() } else { course.tail };
        self.counting().map(of).min().unwrap_or(0)
    }
}

#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a share")]
fn share(part: u64, whole: u64) -> f32 {
    if whole == 0 { 0.0 } else { (part as f64 / whole as f64).min(1.0) as f32 }
}

/// What one client has been told.
#[derive(Clone, Debug, Default)]
pub struct Telling {
    head: usize,
    tail: usize,
    /// The layer that is told of, and how much of it was; `None`: nothing yet.
    layer: usize,
    completed: Option<u64>,
}

impl Telling {
    /// The lines that are news to it.
    pub fn news(&mut self, board: &Board) -> Vec<Bytes> {
        let mut lines = Vec::new();
        // Once the last statuses have begun there is no way back to the layers.
        if self.tail == 0 {
            lines.extend(board.head.iter().skip(self.head).map(|said| said.line.clone()));
            self.head = board.head.len();
            self.layers(board, &mut lines);
        }
        if self.layer >= board.layers.len() || self.tail > 0 {
            let reached = board.reached();
            lines.extend(board.tail.iter().take(reached).skip(self.tail).map(|said| said.line.clone()));
            self.tail = self.tail.max(reached);
        }
        lines
    }

    fn layers(&mut self, board: &Board, lines: &mut Vec<Bytes>) {
        let there = board.mean();
        let mut start: u64 = board.layers.iter().take(self.layer).fold(0, |sum, layer| sum.saturating_add(layer.total));
        while let Some(layer) = board.layers.get(self.layer) {
            let end = start.saturating_add(layer.total);
            let completed = there.clamp(start, end) - start;
            if self.completed.is_none_or(|told| told < completed) {
                self.completed = Some(completed);
                lines.push(layer_line(layer, completed));
            }
            if there < end {
                return;
            }
            (self.layer, self.completed, start) = (self.layer + 1, None, end);
        }
    }
}

/// A line about a layer as Ollama writes it.
fn layer_line(layer: &Layer, completed: u64) -> Bytes {
    let mut members = Map::new();
    members.insert("status".to_owned(), layer.status.as_str().into());
    members.insert("digest".to_owned(), layer.digest.as_str().into());
    for (key, value) in [("total", layer.total), ("completed", completed)] {
        if value > 0 {
            members.insert(key.to_owned(), value.into());
        }
    }
    format!("{}\n", Value::Object(members)).into()
}

fn status_line(status: &str) -> Value {
    serde_json::json!({ "status": status })
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
}
