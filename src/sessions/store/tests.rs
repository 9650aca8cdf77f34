use olol_middleware::time::unix_ms_now;
use serde_json::{Map, json};
use tempfile::TempDir;

use super::*;

const MANY: Bounds = Bounds { sessions: 100, bytes: 1 << 20, messages: 100 };

fn open(folder: &TempDir, bounds: Bounds) -> Store {
    Store::open(&folder.path().join("sub/sessions.redb"), bounds).unwrap_or_else(|error| panic!("{error}"))
}

fn session(id: &str) -> Session {
    Session {
        session_id: id.to_owned(),
        owner: String::new(),
        model_name: "tiny".to_owned(),
        created_at: unix_ms_now(),
        last_active: unix_ms_now(),
        server_host: String::new(),
        moved_from: String::new(),
        model_parameters: Map::new(),
        timeout: 1000.0,
        turns: 0,
        messages: 0,
        bytes: 0,
        first: 1,
        next: 1,
        generation: 0,
        birth: 0,
        stamp: 0,
    }
}

fn said(role: &str, text: &str) -> Entry {
    Entry::sent(json!({"role": role, "content": text}))
}

fn turn(id: &str, text: &str, server: &str) -> Append {
    let entries = vec![said("user", text), said("assistant", &format!("{text}!"))];
    Append { key: id.to_owned(), entries, server: server.to_owned() }
}

async fn texts(store: &Store, id: &str) -> Vec<String> {
    let history = store.history(id.to_owned()).await.unwrap();
    history.iter().map(|entry| entry.message["content"].as_str().unwrap().to_owned()).collect()
}

fn ids(store: &Store) -> Vec<String> {
    let page = store.list(|_| true, "", 1000);
    page.sessions.iter().map(|(session, _)| session.session_id.clone()).collect()
}

#[tokio::test]
async fn what_was_said_is_there_after_the_file_is_closed_and_opened() {
    let folder = tempfile::tempdir().unwrap();
    let before = {
        let store = open(&folder, MANY);
        let made = store.create(session("a"), vec![said("system", "be kind")]).await.unwrap();
        assert!(made.1);
        store.append(turn("a", "one", "s1")).await.unwrap();
        store.append(turn("a", "two", "s2")).await.unwrap().unwrap()
    };
    let store = open(&folder, MANY);
    let (after, _) = store.find("a").unwrap();
    assert_eq!(after, before);
    assert_eq!(texts(&store, "a").await, ["be kind", "one", "one!", "two", "two!"]);
    assert_eq!(
        (after.turns, after.messages, after.server_host.as_str(), after.moved_from.as_str()),
        (2, 5, "s2", "s1")
    );
    assert_eq!(store.counts(), (1, after.bytes));
}

#[tokio::test]
async fn a_file_that_was_never_closed_has_every_turn_that_was_told_to_be_stored() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, MANY);
    store.create(session("a"), Vec::new()).await.unwrap();
    for at in 0..20 {
        store.append(turn("a", &at.to_string(), "s")).await.unwrap();
        let copied = tempfile::tempdir().unwrap();
        let path = copied.path().join("sessions.redb");
        std::fs::copy(folder.path().join("sub/sessions.redb"), &path).unwrap();
        let copy = Store::open(&path, MANY).unwrap_or_else(|error| panic!("{error}"));
        let kept = texts(&copy, "a").await;
        assert_eq!((kept.len(), kept[2 * at].as_str()), (2 * at + 2, at.to_string().as_str()));
    }
}

#[tokio::test]
async fn a_second_one_finds_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, MANY);
    let (first, _) = store.create(session("a"), Vec::new()).await.unwrap();
    store.append(turn("a", "one", "s")).await.unwrap();
    let (second, is_new) = store.create(session("a"), vec![said("system", "no")]).await.unwrap();
    assert!(!is_new && second.created_at == first.created_at && second.turns == 1);
    assert_eq!(texts(&store, "a").await, ["one", "one!"]);
}

#[tokio::test]
async fn the_one_that_was_idle_for_longest_leaves_when_there_are_too_many() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, Bounds { sessions: 2, ..MANY });
    for (age, id) in [(3000, "a"), (2000, "b"), (1000, "c")] {
        let last_active = unix_ms_now() - age;
        let busy = (id == "c").then(|| store.find("a").unwrap().1.begin());
        store.create(Session { last_active, ..session(id) }, vec![said("user", id)]).await.unwrap();
        drop(busy);
    }
    assert_eq!(ids(&store), ["a", "c"], "a was in the midst of a turn");
    store.create(session("d"), Vec::new()).await.unwrap();
    assert_eq!(ids(&store), ["c", "d"]);
    assert!(texts(&store, "a").await.is_empty() && store.append(turn("a", "late", "s")).await.unwrap().is_none());
}

#[tokio::test]
async fn histories_take_no_more_bytes_than_they_may() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, Bounds { bytes: 4000, ..MANY });
    let long = "x".repeat(700);
    for (age, id) in [(3000, "a"), (2000, "b"), (1000, "c")] {
        store.create(Session { last_active: unix_ms_now() - age, ..session(id) }, Vec::new()).await.unwrap();
        store.append(turn(id, &long, "s")).await.unwrap();
    }
    assert_eq!(ids(&store), ["b", "c"]);
    assert!(store.counts().1 <= 4000);
    for _ in 0..5 {
        store.append(turn("c", &long, "s")).await.unwrap();
    }
    assert_eq!((ids(&store), texts(&store, "c").await.len()), (vec!["c".to_owned()], 4));
    let error = store.append(turn("c", &"x".repeat(5000), "s")).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge(_)), "{error}");
}

#[tokio::test]
async fn a_long_session_forgets_its_first_turns_but_not_what_came_before_them() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, Bounds { messages: 5, ..MANY });
    store.create(session("a"), vec![said("system", "be kind")]).await.unwrap();
    for text in ["one", "two", "three"] {
        store.append(turn("a", text, "s")).await.unwrap();
    }
    assert_eq!(texts(&store, "a").await, ["be kind", "two", "two!", "three", "three!"]);
    let (session, _) = store.find("a").unwrap();
    assert_eq!((session.turns, session.messages), (3, 5));
}

#[tokio::test]
async fn what_was_idle_for_too_long_is_gone_when_the_file_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(&folder, MANY);
        let old = Session { last_active: unix_ms_now() - 5000, timeout: 1.0, ..session("old") };
        store.create(old, vec![said("user", "hi")]).await.unwrap();
        store.create(session("new"), Vec::new()).await.unwrap();
    }
    let store = open(&folder, MANY);
    // Its thread sweeps before it does anything else.
    store.end("new".to_owned(), false).await.unwrap();
    assert_eq!(store.counts(), (0, 0));
    assert!(texts(&store, "old").await.is_empty());
}

#[tokio::test]
async fn an_end_that_others_are_still_to_be_told_of_is_kept_with_it() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(&folder, MANY);
        for id in ["told", "untold", "again"] {
            store.create(Session { birth: 7, ..session(id) }, Vec::new()).await.unwrap();
            assert_eq!(store.end(id.to_owned(), id != "told").await.unwrap(), Some(0));
        }
        assert_eq!(store.end("nobody".to_owned(), true).await.unwrap(), None);
        let (again, _) = store.create(session("again"), Vec::new()).await.unwrap();
        assert_eq!(again.generation, 1, "it goes before the one that has ended");
    }
    let store = open(&folder, MANY);
    assert_eq!(store.ended(), [("untold".to_owned(), (0, 7))].into());
    assert!(store.has_ended("untold") && !store.has_ended("told") && !store.has_ended("again"));
    store.told("untold".to_owned()).await.unwrap();
    drop(store);
    assert!(open(&folder, MANY).ended().is_empty());
}

#[tokio::test]
async fn nobody_grows_old_or_young_when_the_time_of_day_is_set() {
    const DAY: i64 = 24 * 3600 * 1000;
    for by in [DAY, -DAY] {
        let folder = tempfile::tempdir().unwrap();
        {
            let store = open(&folder, MANY);
            let last_active = unix_ms_now().saturating_add_signed(-by) - 10_000;
            let of_before = Session { last_active, created_at: last_active, timeout: 60.0, ..session("a") };
            store.create(of_before, vec![said("user", "hi")]).await.unwrap();
            // All that was until now was before the day was set by as much.
            store.clock.follow(-by);
            assert!(!store.find("a").unwrap().0.has_expired(store.now()));
            store.end("nobody".to_owned(), false).await.unwrap();
            assert!(store.clock.jump() == 0 && !store.find("a").unwrap().0.has_expired(store.now()));
        }
        let store = open(&folder, MANY);
        store.end("nobody".to_owned(), false).await.unwrap();
        let (found, _) = store.find("a").expect("it is on the disk with its new times");
        let age = unix_ms_now().abs_diff(found.last_active);
        assert!((10_000..40_000).contains(&age) && found.created_at == found.last_active, "{age}");
    }
}

#[tokio::test]
async fn what_ends_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, MANY);
    store.create(session("a"), Vec::new()).await.unwrap();
    store.create(session("a.b"), Vec::new()).await.unwrap();
    store.append(turn("a", "one", "s")).await.unwrap();
    store.append(turn("a.b", "other", "s")).await.unwrap();
    assert_eq!(store.end("a".to_owned(), false).await.unwrap(), Some(1));
    assert_eq!(store.end("a".to_owned(), false).await.unwrap(), None);
    assert!(store.find("a").is_none() && texts(&store, "a").await.is_empty());
    assert_eq!(texts(&store, "a.b").await, ["other", "other!"]);
}

#[tokio::test]
async fn a_file_is_one_process_s() {
    let folder = tempfile::tempdir().unwrap();
    let _store = open(&folder, MANY);
    let error = Store::open(&folder.path().join("sub/sessions.redb"), MANY).unwrap_err().to_string();
    assert!(error.contains("another process has it open; give each its own [sessions] dir"), "{error}");
}

#[tokio::test]
async fn what_is_no_file_of_sessions_is_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sessions.redb");
    std::fs::write(&path, "something else ".repeat(1000)).unwrap();
    let error = Store::open(&path, MANY).unwrap_err().to_string();
    assert!(error.contains("move the file away"), "{error}");
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("something else"));
}

#[tokio::test]
async fn pages_follow_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, MANY);
    for id in ["c", "a", "e", "b", "d"] {
        store.create(session(id), Vec::new()).await.unwrap();
    }
    let (mut after, mut seen) = (String::new(), Vec::new());
    loop {
        let page = store.list(|session| session.session_id != "b", &after, 2);
        seen.push(page.sessions.len());
        let Some(next) = page.next else { break };
        after = next;
    }
    assert_eq!((seen, after.as_str()), (vec![2, 2], "c"));
}

#[tokio::test]
async fn turns_of_many_at_once_are_all_stored() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&folder, Bounds { messages: 1000, ..MANY }));
    for id in 0..4 {
        store.create(session(&id.to_string()), Vec::new()).await.unwrap();
    }
    let turns = (0..200).map(|at: u32| {
        let store = store.clone();
        async move { store.append(turn(&(at % 4).to_string(), &at.to_string(), "s")).await.unwrap().unwrap() }
    });
    futures_util::future::join_all(turns).await;
    for id in 0..4 {
        assert_eq!(texts(&store, &id.to_string()).await.len(), 100);
    }
}

#[tokio::test]
async fn many_at_once_leave_no_more_than_there_may_be_and_those_who_came_last() {
    const MOST: u64 = 50;
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&folder, Bounds { sessions: MOST, bytes: 40_000, messages: 100 }));
    for wave in 0..4 {
        let making = (0..300).map(|at: u32| {
            let store = store.clone();
            async move {
                let id = format!("{wave}-{at:03}");
                store.create(session(&id), vec![said("user", &"x".repeat(200))]).await.unwrap();
                store.append(turn(&id, &"y".repeat(300), "s")).await.unwrap();
            }
        });
        futures_util::future::join_all(making).await;
        // In one transaction there may be some more: the next one makes room.
        store.end("nobody".to_owned(), false).await.unwrap();
        let (sessions, bytes) = store.counts();
        assert!(sessions <= MOST && bytes <= 40_000 && sessions > 20, "{sessions} sessions, {bytes} bytes");
        assert!(ids(&store).iter().all(|id| id.starts_with(&format!("{wave}-"))), "{:?}", ids(&store));
    }
    let before: Vec<_> = ids(&store);
    drop(store);
    assert_eq!(ids(&open(&folder, MANY)), before, "on the disk it is the same");
}

#[tokio::test]
async fn whoever_makes_many_has_only_his_own_leave() {
    for (bounds, text) in [(Bounds { sessions: 20, ..MANY }, 1), (Bounds { bytes: 20_000, ..MANY }, 900)] {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder, bounds);
        let of = |owner: &str, id: String| Session { owner: owner.to_owned(), ..session(&id) };
        let (mut ada_s, mut ages) = (Vec::new(), 100_000..);
        for at in 0..5 {
            let last_active = unix_ms_now() - ages.next().unwrap();
            let made =
                store.create(Session { last_active, ..of("ada", at.to_string()) }, vec![said("user", "hi")]).await;
            ada_s.push(made.unwrap().0.key());
        }
        for at in 0..200 {
            let made = store.create(of("eve", at.to_string()), vec![said("user", &"x".repeat(text))]).await.unwrap();
            assert!(made.1);
        }
        store.end("nobody".to_owned(), false).await.unwrap();
        assert!(ada_s.iter().all(|key| store.find(key).is_some()), "those of ada are the oldest of all, and stay");
        let (sessions, bytes) = store.counts();
        assert!(sessions <= bounds.sessions && bytes <= bounds.bytes, "{sessions}, {bytes}");
        assert!(sessions > 10 && store.list(|_| true, "", 100).sessions.len() as u64 == sessions);
    }
}

#[tokio::test]
async fn time_passes_though_orders_never_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sessions.redb");
    let opening = move || open_file(&path);
    let store = Arc::new(Store::over(Box::new(opening), MANY, Duration::from_millis(20)).unwrap());
    store.create(Session { timeout: 0.2, ..session("brief") }, vec![said("user", "hi")]).await.unwrap();
    let used = store.create(Session { timeout: 0.2, ..session("used") }, Vec::new()).await.unwrap().0.key();
    let mut loading = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let store = store.clone();
        // Orders without a pause: the writer never waits for one.
        loading.spawn(async move {
            while store.append(turn("used", "more", "s")).await.is_ok_and(|turn| turn.is_some()) {}
        });
    }
    let leaving = async {
        while store.find("brief").is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), leaving).await.unwrap();
    assert!(store.find(&used).is_some() && texts(&store, "brief").await.is_empty());
    loading.abort_all();
    while loading.join_next().await.is_some() {}
    let leaving = async {
        while store.find(&used).is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), leaving).await.unwrap();
    assert_eq!(store.counts(), (0, 0));
}

/// A disk that may fail.
#[derive(Clone, Debug, Default)]
struct Disk {
    bytes: Arc<std::sync::Mutex<Vec<u8>>>,
    is_full: Arc<std::sync::atomic::AtomicBool>,
}

impl Disk {
    fn is_full(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::Relaxed);
    }

    fn check(&self) -> std::io::Result<()> {
        if self.is_full.load(Ordering::Relaxed) { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn open(&self) -> Open {
        let disk = self.clone();
        Box::new(move || builder().create_with_backend(disk.clone()).map_err(|error| Error::Storage(error.to_string())))
    }
}

impl redb::StorageBackend for Disk {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let offset = usize::try_from(offset).unwrap();
        Ok(self.bytes.lock().unwrap()[offset..offset + len].to_vec())
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.check()?;
        self.bytes.lock().unwrap().resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn sync_data(&self, _eventual: bool) -> std::io::Result<()> {
        self.check()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.check()?;
        let offset = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }
}

#[tokio::test]
async fn a_disk_that_fails_loses_what_was_not_told_and_nothing_else() {
    let disk = Disk::default();
    let store = Store::over(disk.open(), MANY, SWEEP).unwrap();
    store.create(session("a"), Vec::new()).await.unwrap();
    store.append(turn("a", "one", "s")).await.unwrap();
    disk.is_full(true);
    for text in ["two", "three"] {
        let error = store.append(turn("a", text, "s")).await.unwrap_err();
        assert!(matches!(error, Error::Storage(_)), "{error}");
    }
    disk.is_full(false);
    // The first one finds the file closed, if it could not be opened again; the next finds it open.
    let _ = store.append(turn("a", "four", "s")).await;
    store.append(turn("a", "five", "s")).await.unwrap();
    let kept = texts(&store, "a").await;
    assert!(
        kept.starts_with(&["one".to_owned(), "one!".to_owned()]) && kept.ends_with(&["five!".to_owned()]),
        "{kept:?}"
    );
    assert!(!kept.contains(&"two".to_owned()) && !kept.contains(&"three".to_owned()), "{kept:?}");
    let (session, _) = store.find("a").unwrap();
    assert_eq!(session.messages, kept.len() as u64);
}
