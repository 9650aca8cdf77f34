//! What the books of the cluster make of what they are told.

use super::*;
use crate::testing;

#[tokio::test(start_paused = true)]
async fn what_servers_say_is_known_under_canonical_names() {
    let cluster = testing::cluster(&[&["Tiny:latest"], &["tiny", "other:q4"]]).await;
    let snapshot = cluster.snapshot();
    let tiny = snapshot.known(&ModelName::parse("TINY").unwrap()).unwrap();
    assert_eq!(tiny.installed.iter().collect::<Vec<_>>(), [0, 1]);
    assert!(tiny.loaded.is_empty());
    cluster.note_loaded(&ServerId::new("1"), &tiny.name, true);
    cluster.catch_up().await;
    let loaded = cluster.snapshot().known(&tiny.name).unwrap().loaded.clone();
    assert_eq!(loaded.iter().collect::<Vec<_>>(), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_change_is_known_at_once_and_outlives_a_report_that_was_begun_before_it() {
    let cluster = testing::cluster(&[&["tiny"], &["tiny"]]).await;
    let (one, copy, tiny) = (ServerId::new("1"), ModelName::parse("copy").unwrap(), ModelName::parse("tiny").unwrap());
    let holders = |name| cluster.snapshot().known(name).map(|known| known.installed.iter().collect::<Vec<_>>());
    let before = Instant::now();
    tokio::time::advance(Duration::from_millis(1)).await;
    cluster.note_installed(std::slice::from_ref(&one), &copy, Some(&tiny));
    cluster.note_removed(std::slice::from_ref(&one), &tiny);
    assert_eq!((holders(&copy), holders(&tiny)), (Some(vec![1]), Some(vec![0])));
    let old = Report { models: vec![Model { name: "tiny:latest".into(), ..Model::default() }], ..Report::default() };
    cluster.report_since(1, old.clone(), before);
    tokio::time::sleep(REBUILD_PAUSE).await;
    assert_eq!((holders(&copy), holders(&tiny)), (Some(vec![1]), Some(vec![0])));
    cluster.report(1, old);
    tokio::time::sleep(REBUILD_PAUSE).await;
    assert_eq!((holders(&copy), holders(&tiny)), (None, Some(vec![0, 1])));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_has_told_of_a_change_is_believed_again() {
    let cluster = testing::cluster(&[&["tiny"]]).await;
    let (server, new) = (ServerId::new("0"), ModelName::parse("new").unwrap());
    let told = |names: &[&str]| {
        let model = |name: &&str| Model { name: (*name).to_owned(), ..Model::default() };
        Report { models: names.iter().map(model).collect(), ..Report::default() }
    };
    let before = Instant::now();
    tokio::time::advance(Duration::from_millis(1)).await;
    cluster.note_installed(std::slice::from_ref(&server), &new, None);
    // An agent's news may be older than the change by some seconds, as far as one knows.
    for (models, is_there) in [(&["tiny"][..], true), (&["tiny", "new"], true), (&["tiny"], false)] {
        cluster.report_since(0, told(models), before);
        tokio::time::sleep(REBUILD_PAUSE).await;
        assert_eq!(cluster.snapshot().known(&new).is_some(), is_there, "{models:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_is_down_after_checks_in_a_row() {
    let cluster = testing::cluster(&[&["tiny"]]).await;
    cluster.check_failed(0, "no answer".into(), 2);
    tokio::time::sleep(REBUILD_PAUSE).await;
    assert_eq!(cluster.snapshot().servers[0].state, State::Up);
    cluster.check_failed(0, "no answer".into(), 2);
    tokio::time::sleep(REBUILD_PAUSE).await;
    assert_eq!(cluster.snapshot().servers[0].state, State::Down);
    cluster.report(0, Report::default());
    tokio::time::sleep(REBUILD_PAUSE).await;
    assert_eq!(cluster.snapshot().servers[0].state, State::Up);
}

#[tokio::test(start_paused = true)]
async fn news_that_were_asked_for_are_waited_for() {
    let cluster = testing::cluster(&[&["tiny"]]).await;
    let asking = tokio::spawn({
        let cluster = cluster.clone();
        async move { cluster.refresh(Duration::from_secs(9)).await }
    });
    cluster.news_wanted(0).await;
    let round = cluster.round_begins(0);
    assert!(!asking.is_finished());
    let model = Model { name: "new".to_owned(), ..Model::default() };
    cluster.report(0, Report { models: vec![model], ..Report::default() });
    cluster.round_ends(0, round);
    asking.await.unwrap();
    assert!(cluster.snapshot().known(&ModelName::parse("new").unwrap()).is_some());
}

fn member(name: &str) -> Member {
    Member { id: ServerId::new(name), weight: NonZeroU32::MIN, source: Source::Dns }
}

#[tokio::test(start_paused = true)]
async fn who_leaves_is_in_question_no_more_and_keeps_its_place_for_later() {
    let cluster = testing::cluster(&[&["tiny"], &["tiny"], &["tiny"]]).await;
    let (one, tiny) = (ServerId::new("1"), ModelName::parse("tiny").unwrap());
    let before = cluster.snapshot();
    cluster.leave(std::slice::from_ref(&one));
    let after = cluster.snapshot();
    let names = |snapshot: &Arc<Snapshot>| snapshot.all().iter().map(|s| s.id.to_string()).collect::<Vec<_>>();
    assert_eq!((names(&before).len(), names(&after)), (3, vec!["0".to_owned(), "2".to_owned()]));
    assert_eq!(after.known(&tiny).unwrap().installed.iter().collect::<Vec<_>>(), [0, 2]);
    assert!(after.server(&one).is_none() && after.servers.len() == 2 && after.servers.get(1).is_none());
    // What is heard of it afterwards is of no account.
    cluster.report(1, Report { models: vec![Model { name: "tiny".into(), ..Model::default() }], ..Report::default() });
    cluster.catch_up().await;
    assert_eq!(cluster.snapshot().known(&tiny).unwrap().installed.iter().collect::<Vec<_>>(), [0, 2]);
    assert_eq!(cluster.join(vec![member("new"), member("1")]), [Ok(3), Ok(1)]);
    let again = cluster.snapshot();
    assert_eq!((again.servers[1].state, again.servers[1].report.models.len()), (State::Unknown, 0));
    assert_eq!(names(&again), ["0", "1", "2", "new"]);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_news_of_one_that_has_just_joined_gets_them() {
    let cluster = testing::cluster(&[&["tiny"]]).await;
    let index = cluster.join(vec![member("new")])[0].unwrap();
    cluster.want_news_of(&ServerId::new("new"));
    cluster.news_wanted(index).await;
}

#[tokio::test(start_paused = true)]
async fn servers_that_say_the_same_share_it() {
    let cluster = Cluster::new(vec![member("0"), member("1")]);
    let said = |modified_at: &str| {
        let model = Model { name: "tiny".into(), modified_at: modified_at.to_owned(), ..Model::default() };
        Report { models: vec![model], ..Report::default() }
    };
    cluster.report(0, said("2026-01-01"));
    cluster.report(1, said("2026-01-02"));
    cluster.catch_up().await;
    let snapshot = cluster.snapshot();
    let [one, other] = [0, 1].map(|index| &snapshot.servers[index].report.models[0]);
    assert_eq!(one.number(), other.number());
    assert_eq!((&*one.modified_at, &*other.modified_at), ("2026-01-01", "2026-01-02"));
    assert_eq!(snapshot.known(&ModelName::parse("tiny").unwrap()).unwrap().makes.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn when_a_model_goes_is_shown_later_than_what_decides_something() {
    let cluster = testing::cluster(&[&["tiny"]]).await;
    let said = |expires_at: &str| {
        let loaded = Loaded { name: "tiny".into(), expires_at: expires_at.to_owned(), ..Loaded::default() };
        let tiny = Model { name: "tiny".into(), ..Model::default() };
        Report { models: vec![tiny], loaded: vec![loaded], ..Report::default() }
    };
    let shown = || cluster.snapshot().servers[0].report.loaded.first().map(|loaded| loaded.expires_at.clone());
    cluster.report(0, said("1"));
    cluster.catch_up().await;
    tokio::time::sleep(REBUILD_PAUSE * 2).await;
    cluster.report(0, said("2"));
    tokio::time::sleep(REBUILD_PAUSE * 2).await;
    assert_eq!(shown().as_deref(), Some("1"));
    tokio::time::sleep(REBUILD_LATER).await;
    assert_eq!(shown().as_deref(), Some("2"));
    // Whatever decides something takes it along.
    cluster.report(0, said("3"));
    cluster.report(0, Report { version: "1".into(), ..said("4") });
    tokio::time::sleep(REBUILD_PAUSE * 2).await;
    assert_eq!(shown().as_deref(), Some("4"));
}

#[tokio::test(start_paused = true)]
async fn how_a_server_is_is_one_word() {
    let cluster = testing::cluster(&[&["tiny"]]).await;
    let condition = async || {
        cluster.catch_up().await;
        cluster.snapshot().servers[0].condition()
    };
    assert_eq!(condition().await, Condition::Up);
    cluster.check_failed(0, "no answer".into(), 2);
    assert_eq!(condition().await, Condition::Degraded);
    cluster.check_failed(0, "no answer".into(), 2);
    assert_eq!(condition().await, Condition::Down);
    assert!(cluster.drain(&ServerId::new("0"), true) && !cluster.drain(&ServerId::new("x"), true));
    assert_eq!(condition().await, Condition::Draining);
    cluster.report(0, Report::default());
    assert!(cluster.drain(&ServerId::new("0"), false));
    assert_eq!(condition().await, Condition::Up);
}

#[test]
fn bits_hold_any_number_of_servers() {
    let mut bits = Bits::default();
    for index in [0, 63, 64, 999] {
        bits.insert(index);
    }
    bits.remove(63);
    assert_eq!(bits.iter().collect::<Vec<_>>(), [0, 64, 999]);
    assert!(bits.contains(999) && !bits.contains(63) && !bits.contains(5000));
}
