//! A server that fails is the client's trouble only where nothing else is possible.

mod harness;

use harness::olol::{chat, chat_at_once, v1_chat};
use harness::{Cluster, Ending, Gate, Olol, Request, Way};

/// What Ollama says in a stream when its runner dies.
const BROKEN: &str = "an error was encountered while running the model: unexpected EOF";

#[tokio::test]
async fn a_server_that_dies_before_the_head_is_replaced_and_the_client_sees_nothing() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have("tiny");
        cluster.server(0).dies_before_head();
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.said().as_str(), answer.ending), (200, "Hello world", Ending::LastChunk));
        assert_eq!((answer.server(), answer.header("x-olol-attempts")), ("1", "2"), "{way:?}");
    }
}

#[tokio::test]
async fn the_only_server_that_dies_before_the_head_is_a_bad_gateway() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        cluster.server(0).dies_before_head();
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.header("x-olol-reason")), (502, "server-failed"), "{way:?}");
        assert!(answer.error().starts_with("server 0 failed while waiting"), "{}", answer.error());
    }
}

#[tokio::test]
async fn a_native_stream_that_breaks_off_ends_with_ollamas_error_line() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have("tiny");
        cluster.server(0).dies_after(["Hel"]);
        let olol = Olol::start(&cluster, "[retry]\nresume = \"off\"").await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.said().as_str(), answer.error().as_str()), (200, "Hel", BROKEN), "{way:?}");
        assert_eq!((answer.chunks.len(), answer.ending), (2, Ending::LastChunk));
        assert_eq!(cluster.server(1).work(), 0, "what reached a client is not begun again");
    }
}

#[tokio::test]
async fn an_event_stream_that_breaks_off_ends_without_its_last_chunk() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        cluster.server(0).dies_after(["Hel"]);
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.ask(&v1_chat("tiny", "hi")).await;
        assert_eq!((answer.status, answer.said().as_str(), answer.ending), (200, "Hel", Ending::Cut), "{way:?}");
    }
}

#[tokio::test]
async fn an_answer_in_one_piece_that_breaks_off_is_never_called_whole() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        cluster.server(0).dies_after(["Hel"]);
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.ask(&chat_at_once("tiny", "hi")).await;
        assert_eq!((answer.status, answer.ending), (200, Ending::Cut), "{way:?}");
    }
}

#[tokio::test]
async fn a_server_that_takes_its_time_is_not_given_up() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have("tiny");
        let gate = Gate::closed();
        cluster.server(0).loads_until(&gate);
        let olol = Olol::start(&cluster, "").await;
        let mut slow = olol.begin(&chat("tiny", "hi")).await;
        cluster.server(0).asked(1).await;
        gate.open();
        assert_eq!(slow.answer().await.server(), "0", "{way:?}");
        assert_eq!(cluster.server(1).work(), 0);
    }
}

#[tokio::test]
async fn a_server_that_stalls_does_not_hold_up_the_others() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([5, 2]).all_have_loaded("tiny");
        cluster.server(0).stalls_before_head();
        // Where calls go is a question of load alone.
        let olol = Olol::start(&cluster, "stack.order = [\"model-route\", \"retry\"]").await;
        let _stalled = [olol.begin(&chat("tiny", "1")).await, olol.begin(&chat("tiny", "2")).await];
        cluster.server(0).asked(2).await;
        assert_eq!(olol.chat("tiny", "3").await.server(), "1", "{way:?}");
    }
}

#[tokio::test]
async fn a_pooled_connection_that_died_is_replaced_and_the_client_sees_nothing() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        cluster.server(0).dies_on_reuse();
        let olol = Olol::start(&cluster, "").await;
        for _ in 0..3 {
            let answer = olol.chat("tiny", "hi").await;
            assert_eq!((answer.status, answer.said().as_str()), (200, "Hello world"), "{way:?}: {}", answer.text());
        }
        let died = cluster.server(0).seen("/api/chat").iter().filter(|seen| seen.is_reused).count();
        assert!(died > 0, "no pooled connection was used");
    }
}

#[tokio::test]
async fn a_long_body_is_sent_again_when_a_pooled_connection_had_died() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        cluster.server(0).dies_on_reuse();
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.chat("tiny", &"x".repeat(3_000_000)).await;
        assert_eq!((answer.status, answer.said().as_str()), (200, "Hello world"), "{way:?}: {}", answer.text());
    }
}

#[tokio::test]
async fn an_upload_which_can_be_sent_only_once_goes_over_a_fresh_connection() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way);
        cluster.server(0).dies_on_reuse();
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.ask(&Request::post("/api/blobs/sha256:00", "bytes")).await;
        assert_eq!(answer.status, 201, "{way:?}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_model_that_was_deleted_is_found_elsewhere() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        cluster.server(0).only_lists("tiny");
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.server()), (200, "1"), "{way:?}: {}", answer.text());
        assert_eq!(cluster.server(0).work(), 1, "it was believed to have it");
    }
}

#[tokio::test]
async fn a_model_that_appeared_where_nobody_knew_of_it_is_found() {
    let cluster = Cluster::of(2).await;
    cluster.server(0).has("tiny");
    let olol = Olol::start(&cluster, "").await;
    cluster.server(0).lost("tiny");
    cluster.server(1).has("tiny");
    let answer = olol.chat("tiny", "hi").await;
    assert_eq!((answer.status, answer.server()), (200, "1"), "{}", answer.text());
}

#[tokio::test]
async fn a_model_that_nobody_has_is_refused_in_ollamas_words() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.chat("nosuch", "hi").await;
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (404, r#"{"error":"model 'nosuch' not found"}"#),
            "{way:?}"
        );
    }
}

#[tokio::test]
async fn a_busy_server_hands_over_to_one_that_is_not() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have("tiny");
        cluster.server(0).is_busy();
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, answer.server()), (200, "1"), "{way:?}");
    }
}

#[tokio::test]
async fn when_all_are_busy_the_client_reads_ollamas_own_words() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    for server in cluster.servers() {
        server.is_busy();
    }
    let olol = Olol::start(&cluster, "").await;
    let answer = olol.chat("tiny", "hi").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, ""));
    assert_eq!(answer.error(), "server busy, please try again.  maximum pending requests exceeded");
}

#[tokio::test]
async fn what_a_server_says_of_the_request_itself_stands() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have("tiny");
        cluster.server(0).refuses(500, "option \"num_predict\" must be of type integer");
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!(
            (answer.status, answer.error().as_str()),
            (500, "option \"num_predict\" must be of type integer"),
            "{way:?}"
        );
        assert_eq!(cluster.server(1).work(), 0);
    }
}

#[tokio::test]
async fn a_server_killed_under_load_ends_no_stream() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have_loaded("tiny");
        let gate = Gate::closed();
        for server in cluster.servers() {
            server.is_paced_by(&gate);
        }
        let olol = Olol::start(&cluster, "").await;
        let mut streams = Vec::new();
        for _ in 0..9 {
            streams.push(olol.begin(&chat("tiny", "hi")).await);
        }
        for server in cluster.servers() {
            server.asked(3).await;
        }
        gate.let_through(9);
        for stream in &mut streams {
            stream.head().await;
            stream.line().await;
        }
        cluster.server(0).dies();
        gate.open();
        for mut stream in streams {
            let (lines, ending) = stream.rest().await;
            let lines: Vec<serde_json::Value> =
                lines.iter().map(|line| serde_json::from_slice(line).unwrap()).collect();
            assert_eq!((ending, lines.len()), (Ending::LastChunk, 2), "{way:?}: {lines:?}");
            assert_eq!(
                (lines[0]["message"]["content"].as_str(), lines[1]["done"].as_bool()),
                (Some(" world"), Some(true))
            );
            assert_eq!((&lines[1]["prompt_eval_count"], &lines[1]["eval_count"]), (&5.into(), &2.into()), "{way:?}");
        }
        for _ in 0..6 {
            assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world", "{way:?}");
        }
    }
}

#[tokio::test]
async fn when_nobody_answers_each_dialect_has_its_own_error() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    cluster.server(0).dies();
    let native = olol.chat("tiny", "hi").await;
    assert_eq!((native.status, native.header("content-type")), (502, "application/json; charset=utf-8"));
    assert!(native.json()["error"].is_string(), "{}", native.text());
    let openai = olol.ask(&v1_chat("tiny", "hi")).await;
    assert_eq!((openai.status, openai.json()["error"]["type"].as_str()), (502, Some("api_error")));
    let anthropic = olol.ask(&Request::post("/v1/messages", r#"{"model":"tiny","max_tokens":1,"messages":[]}"#)).await;
    assert_eq!(
        (anthropic.json()["type"].as_str(), anthropic.json()["error"]["type"].as_str()),
        (Some("error"), Some("api_error"))
    );
}

#[tokio::test]
async fn the_proxy_itself_answers_while_every_server_is_down() {
    let cluster = Cluster::of(1).await;
    let olol = Olol::start(&cluster, "").await;
    cluster.server(0).dies();
    assert_eq!(olol.ask(&Request::new("HEAD", "/")).await.status, 200, "the CLI asks this first");
    assert_eq!(olol.get("/api/status").await.json()["olol"]["servers"]["total"], 1);
    assert_eq!(olol.get("/healthz").await.text(), "ok\n");
}
