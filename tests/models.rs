//! How models come to servers: pulled by one, copied by the others, and the same everywhere.

mod harness;

use std::sync::Arc;

use futures_util::stream::BoxStream;
use harness::{Answer, Ending, Gate, Hub, Keeper, Olol, Request, patiently, until};
use olol::agent::Agent;
use olol::models::Brought;
use olol::models::registry::{Registry, Source};
use olol::models::store::{Digest, Manifest};
use olol_middleware::{BoxError, ModelName, ServerId};
use olol_proto::v1::{CopyModelRequest, CopyOrder, CopyPiece, CopySource, ReadBlobRequest, ReadModelRequest};
use serde_json::{Value, json};
use tonic::Code;

/// Weights that are no multiple of anything.
fn weights() -> Vec<u8> {
    (0..1_500_007_u32).map(|at| (at * 7).to_le_bytes()[0]).collect()
}

const TEMPLATE: &[u8] = b"{{ .Prompt }}";

/// Bytes of the model of the tests.
fn size() -> u64 {
    (weights().len() + TEMPLATE.len()) as u64
}

/// Some Ollamas, with agents or without, a registry that has `tiny`, and a proxy before all.
struct Lab {
    hub: Hub,
    keepers: Vec<Keeper>,
    agents: Vec<Option<Agent>>,
    olol: Olol,
    /// The digest of `tiny` in the registry.
    digest: String,
}

impl Lab {
    async fn of(agents: usize, bare: usize, toml: &str) -> Self {
        let hub = Hub::start();
        let digest = hub.has("tiny", &[&weights(), TEMPLATE]);
        let (mut keepers, mut beside, mut list) = (Vec::new(), Vec::new(), Vec::new());
        for at in 0..agents + bare {
            let keeper = Keeper::start();
            let (address, agent) = if at < agents {
                let agent = keeper.agent().await;
                (agent.address().to_string(), Some(agent))
            } else {
                (format!("http://{}", keeper.address()), None)
            };
            list.push(format!("{at}@{address}"));
            keepers.push(keeper);
            beside.push(agent);
        }
        let olol = Olol::at(list, toml).await;
        for at in 0..agents {
            until("agents have told of themselves", || olol.vitals(at).is_some()).await;
        }
        until("all are up", || (0..agents + bare).all(|at| olol.is_server_up(at))).await;
        Self { hub, keepers, agents: beside, olol, digest }
    }

    fn pull(&self) -> Request {
        Request::post("/api/pull", json!({"model": self.hub.name("tiny"), "insecure": true}))
    }

    fn digests(&self) -> Vec<Option<String>> {
        self.keepers.iter().map(|keeper| keeper.digest(&self.hub.name("tiny"))).collect()
    }

    /// The digests where this many have it.
    fn having(&self) -> usize {
        self.digests().iter().filter(|digest| **digest == Some(self.digest.clone())).count()
    }

    fn shows_no_copies(&self) {
        for keeper in &self.keepers {
            let names: Vec<String> = keeper.holds().into_iter().map(|(name, _)| name).collect();
            assert!(!names.iter().any(|name| ModelName::is_unfinished(name)), "{names:?}");
        }
    }
}

/// Checks that a pull was told as one Ollama would: layers one after the other, never back, and one last word.
fn is_valid(answer: &Answer) {
    let lines = answer.lines();
    assert_eq!(
        (answer.status, answer.ending, answer.header("content-type")),
        (200, Ending::LastChunk, "application/x-ndjson")
    );
    assert_eq!(lines[0]["status"], "pulling manifest");
    let mut seen: Vec<(&str, u64)> = Vec::new();
    for line in lines.iter().filter(|line| line["digest"].is_string()) {
        let (digest, done) = (line["digest"].as_str().unwrap_or_default(), line["completed"].as_u64().unwrap_or(0));
        match seen.last_mut() {
            Some((last, before)) if *last == digest => {
                assert!(*before <= done, "{lines:?}");
                *before = done;
            }
            _ => {
                assert!(seen.iter().all(|(other, _)| *other != digest), "{lines:?}");
                seen.push((digest, done));
            }
        }
    }
    let ends = lines.iter().filter(|line| line["status"] == "success" || line["error"].is_string()).count();
    assert_eq!(ends, 1);
}

fn last(answer: &Answer) -> Value {
    answer.lines().pop().unwrap_or_default()
}

#[tokio::test]
async fn a_pull_asks_the_registry_once_and_brings_the_same_model_everywhere() {
    let lab = Lab::of(4, 0, "").await;
    let pulled = lab.olol.ask(&lab.pull()).await;
    is_valid(&pulled);
    assert_eq!(last(&pulled), json!({"status": "success"}));
    assert_eq!((lab.having(), lab.hub.gave(), lab.hub.was_asked()), (4, size(), 1));
    let told: Vec<u64> = pulled.lines().iter().filter_map(|line| line["total"].as_u64()).collect();
    assert!(told.contains(&(weights().len() as u64)), "a layer is told with its own size: {told:?}");
    lab.shows_no_copies();
    let again = lab.olol.ask(&lab.pull()).await;
    assert_eq!((last(&again)["status"].as_str(), lab.hub.gave(), lab.hub.was_asked()), (Some("success"), size(), 2));
}

#[tokio::test]
async fn who_hears_of_the_end_of_a_pull_sees_all_that_there_is_to_say_of_the_model() {
    for (agents, bare) in [(1, 0), (0, 1), (2, 1)] {
        let lab = Lab::of(agents, bare, "").await;
        assert_eq!(last(&lab.olol.ask(&lab.pull()).await)["status"], "success");
        let model = lab.olol.model(&lab.hub.name("tiny")).await;
        assert_eq!(
            model["digest"].as_str().map(|digest| digest.trim_start_matches("sha256:")),
            Some(lab.digest.trim_start_matches("sha256:")),
            "{agents} and {bare}"
        );
        assert!(model["size"].as_u64() > Some(0) && model["agrees"] == true, "{model:#}");
        assert_eq!(model["digests"].as_array().map(Vec::len), Some(1), "{model:#}");
        assert_eq!(model["pending_pulls"], json!([]));
    }
}

#[tokio::test]
async fn a_wanted_model_that_nobody_has_is_asked_of_the_registry_once() {
    let lab = Lab::of(3, 0, "desired.at-once = 8").await;
    let pin = Request::new("PUT", &format!("/api/status/models/{}", lab.hub.name("tiny")));
    let answer = lab.olol.ask(&pin.with_body(json!({"replicas": 3}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    until("all have it", || lab.having() == 3).await;
    assert_eq!((lab.hub.gave(), lab.hub.was_asked()), (size(), 1));
}

#[tokio::test]
async fn a_pull_without_stream_copies_as_well() {
    let lab = Lab::of(2, 0, "").await;
    let body = json!({"model": lab.hub.name("tiny"), "insecure": true, "stream": false});
    let pulled = lab.olol.ask(&Request::post("/api/pull", body)).await;
    assert_eq!((pulled.status, pulled.json()["status"].as_str()), (200, Some("success")));
    assert_eq!((lab.having(), lab.hub.gave()), (2, size()));
}

#[tokio::test]
async fn a_pull_says_at_how_many_servers_it_is_to_be() {
    let lab = Lab::of(3, 0, "pull.replicas = \"one\"").await;
    assert_eq!(last(&lab.olol.ask(&lab.pull()).await)["status"], "success");
    assert_eq!(lab.having(), 1);
    let two = lab.pull().header("X-Olol-Replicas", "2");
    assert_eq!(last(&lab.olol.ask(&two).await)["status"], "success");
    assert_eq!((lab.having(), lab.hub.gave()), (2, size()), "those that have it count");
    let odd = lab.olol.ask(&lab.pull().header("X-Olol-Replicas", "most")).await;
    assert_eq!(odd.status, 400);
    assert!(odd.json()["error"].as_str().unwrap().starts_with("X-Olol-Replicas: say all"), "{}", odd.text());
}

#[tokio::test]
async fn a_bare_ollama_asks_the_registry_itself() {
    let lab = Lab::of(2, 1, "").await;
    let pulled = lab.olol.ask(&lab.pull()).await;
    is_valid(&pulled);
    assert_eq!((last(&pulled)["status"].as_str(), lab.having(), lab.hub.gave()), (Some("success"), 3, 2 * size()));
}

#[tokio::test]
async fn when_the_one_that_asks_dies_another_takes_its_place_and_it_is_finished_later() {
    let lab = Lab::of(3, 0, "pool.check-interval-ms = 50").await;
    let gate = Gate::closed();
    lab.hub.gives_half_until(&gate);
    let mut pulling = lab.olol.begin(&lab.pull().header("X-Olol-Replicas", "2")).await;
    pulling.head().await;
    let first = || lab.keepers.iter().position(|keeper| keeper.parts() > 0);
    until("somebody has a part", || first().is_some()).await;
    let dead = first().unwrap();
    lab.keepers[dead].dies();
    until("another has a part", || lab.keepers.iter().filter(|keeper| keeper.parts() > 0).count() == 2).await;
    gate.open();
    let (lines, _) = pulling.rest().await;
    let end: Value = serde_json::from_slice(lines.last().unwrap()).unwrap();
    assert_eq!((end, lab.having()), (json!({"status": "success"}), 2));
    lab.keepers[dead].comes_back();
    until("it is known again", || lab.olol.is_server_up(dead)).await;
    let before = lab.hub.gave();
    assert_eq!(last(&lab.olol.ask(&lab.pull()).await)["status"], "success");
    assert_eq!((lab.having(), lab.hub.gave()), (3, before), "it copies the rest");
    lab.shows_no_copies();
}

#[tokio::test]
async fn who_fails_is_named_and_the_others_have_it() {
    let lab = Lab::of(3, 0, "").await;
    // It can neither copy nor pull.
    lab.keepers[2].copies_behind(&Gate::closed());
    let gate = Gate::closed();
    lab.hub.gives_half_until(&gate);
    let mut pulling = lab.olol.begin(&lab.pull()).await;
    pulling.head().await;
    until("somebody asks the registry", || lab.hub.was_asked() == 1).await;
    lab.keepers[2].dies();
    gate.open();
    let (lines, _) = pulling.rest().await;
    let end: Value = serde_json::from_slice(lines.last().unwrap()).unwrap();
    assert!(end["error"].as_str().unwrap().contains("server 2"), "{end}");
    assert_eq!(lab.having(), 2);
    let model = lab.olol.model(&lab.hub.name("tiny")).await;
    assert_eq!(model["pending_pulls"], json!([]), "it is on its way to nobody any more");
}

#[tokio::test]
async fn a_tag_that_has_changed_is_brought_up_to_date_everywhere() {
    let lab = Lab::of(3, 0, "").await;
    lab.olol.ask(&lab.pull()).await;
    let new = lab.hub.has("tiny", &[b"other weights", TEMPLATE]);
    assert_eq!(last(&lab.olol.ask(&lab.pull()).await)["status"], "success");
    assert_eq!(lab.digests(), vec![Some(new); 3]);
    assert_eq!(lab.hub.gave(), size() + 13, "only what is new");
    lab.shows_no_copies();
    for keeper in lab.keepers.iter().filter(|keeper| keeper.blobs().len() != 2) {
        // Who pulled under the model's own name prunes as Ollama does, which this one does not imitate.
        assert_eq!((keeper.blobs().len(), keeper.pulls()), (3, 2));
    }
}

#[tokio::test]
async fn a_model_that_the_registry_lacks_is_refused_in_ollamas_words() {
    let lab = Lab::of(3, 0, "").await;
    let pulled = lab.olol.ask(&Request::post("/api/pull", json!({"model": lab.hub.name("nosuch")}))).await;
    assert_eq!(last(&pulled), json!({"error": "pull model manifest: file does not exist"}));
    assert_eq!(lab.hub.was_asked(), 1, "it would say the same to all");
}

#[tokio::test]
async fn a_full_disk_is_seen_before() {
    let lab = Lab::of(2, 0, "pull.margin-mib = 1073741824").await;
    for (at, keeper) in lab.keepers.iter().enumerate() {
        // An Ollama without models does not tell where it would have them.
        keeper.has("other", &[b"others"]);
        until("the room is known", || lab.olol.vitals(at).is_some_and(|vitals| vitals.disk_free.is_some())).await;
    }
    lab.hub.gives_half_until(&Gate::closed());
    let pulled = lab.olol.ask(&lab.pull()).await;
    assert!(pulled.error().starts_with("no room: it needs"), "{}", pulled.text());
    let fits = lab.olol.ask(&lab.pull().header("X-Olol-Replicas", "fits")).await;
    assert!(fits.error().starts_with("no room"), "{}", fits.text());
    assert_eq!(lab.having(), 0);
}

#[tokio::test]
async fn a_disk_without_room_for_a_name_leaves_nothing_under_it() {
    let lab = Lab::of(2, 0, "").await;
    let first = lab.pull().header("X-Olol-Servers", "0");
    assert_eq!(last(&lab.olol.ask(&first).await)["status"], "success");
    lab.keepers[1].is_full();
    let pulled = lab.olol.ask(&lab.pull()).await;
    let why = pulled.error();
    assert!(why.contains("server 1: no room: copy_file_range: no space left on device"), "{why}");
    assert!(!lab.keepers[1].has_file(&lab.hub.name("tiny")));
    assert_eq!((lab.having(), lab.hub.gave()), (1, size()));
}

#[tokio::test]
async fn names_of_copies_are_never_shown() {
    let lab = Lab::of(2, 0, "").await;
    let gate = Gate::closed();
    for keeper in &lab.keepers {
        keeper.copies_behind(&gate);
    }
    let mut pulling = lab.olol.begin(&lab.pull()).await;
    pulling.head().await;
    let has_copy = |keeper: &Keeper| keeper.holds().iter().any(|(name, _)| ModelName::is_unfinished(name));
    until("a copy has come", || lab.keepers.iter().any(has_copy)).await;
    for path in ["/api/tags", "/v1/models", "/metrics", "/api/status?detail=models", "/api/status?detail=servers"] {
        let shown = lab.olol.get(path).await;
        assert_eq!(shown.status, 200);
        assert!(!shown.text().contains(ModelName::COPYING), "{path}: {}", shown.text());
    }
    for agent in lab.agents.iter().flatten() {
        let mut client = harness::grpc::client(agent.address()).await;
        let listed = client.list_models(olol_proto::v1::ListModelsRequest {}).await.unwrap().into_inner();
        assert!(!format!("{listed:?}").contains(ModelName::COPYING));
    }
    gate.open();
    let (lines, _) = pulling.rest().await;
    assert_eq!(lines.last().map(Vec::as_slice), Some(&b"{\"status\":\"success\"}\n"[..]));
    lab.shows_no_copies();
}

#[tokio::test]
async fn two_who_pull_the_same_share_the_work() {
    let lab = Lab::of(2, 0, "").await;
    let gate = Gate::closed();
    lab.hub.gives_half_until(&gate);
    let mut one = lab.olol.begin(&lab.pull()).await;
    let mut two = lab.olol.begin(&lab.pull()).await;
    one.head().await;
    two.head().await;
    // One who leaves does not end it for the other.
    drop(one);
    gate.open();
    let (lines, _) = two.rest().await;
    assert_eq!(lines.last().map(Vec::as_slice), Some(&b"{\"status\":\"success\"}\n"[..]));
    assert_eq!((lab.having(), lab.hub.was_asked(), lab.hub.gave()), (2, 1, size()));
}

#[tokio::test]
async fn a_pull_ends_when_nobody_follows_it_and_goes_on_from_there() {
    let lab = Lab::of(1, 1, "").await;
    let gate = Gate::closed();
    lab.hub.gives_half_until(&gate);
    let mut pulling = lab.olol.begin(&lab.pull()).await;
    pulling.head().await;
    until("all have a part", || lab.keepers.iter().all(|keeper| keeper.parts() > 0)).await;
    let before = lab.hub.gave();
    drop(pulling);
    until("nobody pulls", || !lab.keepers.iter().any(Keeper::is_pulling)).await;
    gate.open();
    assert_eq!(last(&lab.olol.ask(&lab.pull()).await)["status"], "success");
    assert_eq!(lab.having(), 2);
    // What was on its way when the client left is lost, what had come is not.
    assert!(lab.hub.gave() - before < 2 * size(), "{} and {before} before", lab.hub.gave());
}

#[tokio::test]
async fn what_a_killed_agent_has_left_is_cleared_away() {
    let keeper = Keeper::start();
    let kept = keeper.has("tiny", &[b"weights"]);
    // Nobody listens there: its registry has gone.
    keeper.has("127.0.0.1:1/olol-copy-00/tiny:latest", &[b"weights"]);
    let agent = keeper.agent().await;
    until("only the model itself is there", || keeper.holds() == [("tiny:latest".to_owned(), kept.clone())]).await;
    assert_eq!(keeper.blobs().len(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn a_copy_that_another_agent_is_making_is_not_shown_and_left_alone() {
    let keeper = Keeper::start();
    keeper.has("tiny", &[b"weights"]);
    let manifest = format!(r#"{{"layers":[{{"digest":"{}","size":7}}]}}"#, Digest::of(b"weights"));
    let registry = Registry::open(Manifest::parse(manifest.into()).unwrap(), Arc::new(Never), None).await.unwrap();
    keeper.has(&registry.name("tiny"), &[b"weights"]);
    let left = keeper.has("127.0.0.1:1/olol-copy-00/tiny:latest", &[b"weights"]);
    let agent = keeper.agent().await;
    let olol = Olol::at(vec![format!("a@{}", agent.address())], "").await;
    until("it is up", || olol.is_server_up(0)).await;
    until("what is left of another is cleared away", || keeper.holds().len() == 2).await;
    let shown = olol.get("/api/tags").await.text();
    assert!(shown.contains("tiny:latest") && !shown.contains(ModelName::COPYING), "{shown}");
    assert!(keeper.holds().iter().all(|(_, digest)| *digest == left));
    drop(registry);
}

/// A source that gives nothing.
struct Never;

impl Source for Never {
    fn read(&self, _: &Digest, _: u64, _: u64) -> BoxStream<'static, Result<bytes::Bytes, BoxError>> {
        Box::pin(futures_util::stream::pending())
    }
}

#[tokio::test]
async fn what_has_got_the_port_of_a_killed_agents_copy_does_not_keep_its_name() {
    let keeper = Keeper::start();
    keeper.has("tiny", &[b"weights"]);
    let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    keeper.has(&format!("{}/olol-copy-00/tiny:latest", other.local_addr().unwrap()), &[b"weights"]);
    let agent = keeper.agent().await;
    until("only the model itself is there", || keeper.holds().len() == 1).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_manifest_that_tells_of_more_than_the_disk_has_is_not_begun_with() {
    let keeper = Keeper::start();
    // So that it is known where its models are.
    keeper.has("other", &[b"others"]);
    let agent = keeper.agent().await;
    let olol = Olol::at(vec![format!("a@{}", agent.address())], "").await;
    until("the room is known", || olol.vitals(0).is_some_and(|vitals| vitals.disk_free.is_some())).await;
    let mut taker = harness::grpc::client(agent.address()).await;
    let (layer, small) = (Digest::of(b"weights"), Digest::of(b"{}"));
    let manifest = format!(
        r#"{{"config":{{"digest":"{small}","size":2}},"layers":[{{"digest":"{layer}","size":{}}}]}}"#,
        1_u64 << 60
    );
    let order = CopyOrder {
        model: "tiny:latest".to_owned(),
        digest: Digest::of(manifest.as_bytes()).hex().to_owned(),
        relays: true,
        ..CopyOrder::default()
    };
    let (tell, orders) = tokio::sync::mpsc::channel(8);
    tell.send(CopyModelRequest { order: Some(order), piece: None }).await.unwrap();
    let orders = futures_util::stream::unfold(orders, |mut orders| async move { Some((orders.recv().await?, orders)) });
    let mut said = taker.copy_model(Box::pin(orders)).await.unwrap().into_inner();
    let refused = loop {
        match patiently("an answer", said.message()).await {
            Ok(message) => {
                let want = message.unwrap().want.unwrap();
                assert_eq!(want.digest, "", "nothing but the manifest is asked for");
                let piece = CopyPiece { id: want.id, data: manifest.clone().into(), error: String::new() };
                tell.send(CopyModelRequest { order: None, piece: Some(piece) }).await.unwrap();
            }
            Err(status) => break status,
        }
    };
    assert!(
        refused.message().starts_with("not enough space on the disk: by its manifest 1099511627777 MiB"),
        "{refused}"
    );
    assert_eq!((keeper.pulls(), keeper.holds().len(), keeper.blobs().len()), (0, 1, 1));
}

#[tokio::test]
async fn a_copy_comes_over_whoever_ordered_it_where_the_source_cannot_be_reached() {
    let (source, target) = (Keeper::start(), Keeper::start());
    let digest = source.has("tiny", &[&weights(), TEMPLATE]);
    let (giving, taking) = (source.agent().await, target.agent().await);
    let mut giver = harness::grpc::client(giving.address()).await;
    let mut taker = harness::grpc::client(taking.address()).await;
    let (tell, orders) = tokio::sync::mpsc::channel(64);
    let gone = CopySource { address: "127.0.0.1:1".to_owned(), model: "tiny:latest".to_owned() };
    let order = CopyOrder {
        model: "tiny:latest".to_owned(),
        digest: digest.clone(),
        sources: vec![gone],
        relays: true,
        ..CopyOrder::default()
    };
    tell.send(CopyModelRequest { order: Some(order), piece: None }).await.unwrap();
    let orders = futures_util::stream::unfold(orders, |mut orders| async move { Some((orders.recv().await?, orders)) });
    let mut said = taker.copy_model(Box::pin(orders)).await.unwrap().into_inner();
    let mut statuses = Vec::new();
    while let Some(message) = patiently("the copy", said.message()).await.unwrap() {
        statuses.extend(message.progress.map(|progress| progress.status));
        let Some(want) = message.want else { continue };
        let data = if want.digest.is_empty() {
            let request = ReadModelRequest { model: "tiny:latest".to_owned(), digest: digest.clone() };
            giver.read_model(request).await.unwrap().into_inner().manifest
        } else {
            let request = ReadBlobRequest { digest: want.digest, offset: want.offset, length: want.length };
            let mut pieces = giver.read_blob(request).await.unwrap().into_inner();
            let mut data = bytes::BytesMut::new();
            while let Some(piece) = pieces.message().await.unwrap() {
                data.extend_from_slice(&piece.data);
            }
            data.freeze()
        };
        let piece = CopyPiece { id: want.id, data, error: String::new() };
        tell.send(CopyModelRequest { order: None, piece: Some(piece) }).await.unwrap();
    }
    assert_eq!(statuses.last().map(String::as_str), Some("success"));
    assert_eq!(target.holds(), [("tiny:latest".to_owned(), digest)]);
}

#[tokio::test]
async fn an_agent_gives_nothing_but_models_and_to_nobody_but_its_cluster() {
    let keeper = Keeper::start();
    let digest = keeper.has("tiny", &[b"weights"]);
    let agent = keeper.agent().await;
    let mut client = harness::grpc::client(agent.address()).await;
    let model = |model: &str, digest: &str| ReadModelRequest { model: model.to_owned(), digest: digest.to_owned() };
    assert!(client.read_model(model("tiny", &digest)).await.is_ok());
    for (name, wanted) in [
        ("../../secret", Code::InvalidArgument),
        ("/etc/passwd", Code::InvalidArgument),
        ("tiny:../../x", Code::InvalidArgument),
        ("other", Code::NotFound),
    ] {
        assert_eq!(client.read_model(model(name, "")).await.unwrap_err().code(), wanted, "{name}");
    }
    assert_eq!(client.read_model(model("tiny", &"0".repeat(64))).await.unwrap_err().code(), Code::NotFound);
    for (blob, wanted) in [
        ("../../../etc/passwd".to_owned(), Code::InvalidArgument),
        (format!("sha256:{}", "0".repeat(64)), Code::NotFound),
        (String::new(), Code::InvalidArgument),
    ] {
        let request = ReadBlobRequest { digest: blob.clone(), offset: 0, length: 0 };
        assert_eq!(client.read_blob(request).await.unwrap_err().code(), wanted, "{blob}");
    }
    let stranger = tonic::transport::Channel::from_shared(format!("http://{}", agent.address())).unwrap();
    let mut stranger = olol_proto::v1::server_client::ServerClient::new(stranger.connect().await.unwrap());
    assert_eq!(stranger.read_model(model("tiny", "")).await.unwrap_err().code(), Code::Unauthenticated);
    let order = CopyOrder {
        model: "evil".to_owned(),
        digest,
        sources: vec![CopySource { address: "192.0.2.1:1".to_owned(), model: "evil".to_owned() }],
        ..CopyOrder::default()
    };
    let orders = futures_util::stream::iter([CopyModelRequest { order: Some(order), piece: None }]);
    assert_eq!(stranger.copy_model(orders).await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_model_is_brought_to_one_server_from_those_who_have_it_or_else_from_the_registry() {
    let lab = Lab::of(2, 1, "").await;
    let name = lab.hub.name("tiny");
    let bring = async |at: usize| {
        let (mut lines, to) = (Vec::new(), ServerId::new(&at.to_string()));
        let brought = lab.olol.models().bring(&name, &to, &mut |line| lines.push(line)).await;
        (brought.map_err(|error| error.to_string()), lines)
    };
    assert_eq!(bring(0).await.0, Ok(Brought::Pulled));
    let known = |at: usize| lab.olol.listed(at).iter().any(|model| model.digest == lab.digest);
    until("it is known where it is", || known(0)).await;
    let (brought, lines) = bring(1).await;
    assert_eq!(brought, Ok(Brought::Copied));
    assert!(lines.iter().any(|line| line.total == weights().len() as u64 && line.completed == line.total));
    until("it is known there, too", || known(1)).await;
    assert_eq!((bring(1).await.0, lab.hub.gave()), (Ok(Brought::Here), size()));
    assert_eq!((bring(2).await.0, lab.hub.gave()), (Ok(Brought::Pulled), 2 * size()));
    assert_eq!(lab.having(), 3);
    assert_eq!(bring(7).await.0, Err("there is no server '7'".to_owned()));
}

#[tokio::test]
async fn the_proxy_gives_no_models_away() {
    let lab = Lab::of(1, 0, "").await;
    let mut client = harness::grpc::client(lab.olol.address()).await;
    let refused = client.read_model(ReadModelRequest { model: "tiny".to_owned(), digest: String::new() }).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
}
