//! A server that fails a share of its calls is degraded, whatever its checks say, and gets calls when the others have no room.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::{Cluster, Olol, Request, Way};
use serde_json::Value;

/// Circuits stay closed: what is told here is told by the share of failures alone.
const RULES: &str = "[retry]\nbreaker-failures = 1000\n[judge]\nleast-calls = 4";

/// What the page of servers says of the first.
async fn first(olol: &Olol) -> Value {
    let page = olol.ask(&Request::get("/api/status?detail=servers")).await.json();
    page["servers"][0].clone()
}

#[tokio::test]
async fn a_server_that_breaks_its_answers_off_is_degraded_and_passed_over() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).weighing([1000, 1]).all_have_loaded("tiny");
        cluster.server(0).dies_after(["Hel"]);
        let olol = Olol::start(&cluster, RULES).await;
        for turn in 0..4 {
            let answer = olol.chat("tiny", &format!("turn {turn}")).await;
            assert_eq!(answer.status, 200, "another goes on: {}", answer.text());
        }
        let told = first(&olol).await;
        assert_eq!(
            (&told["state"], &told["online"], &told["usable"]),
            (&"degraded".into(), &true.into(), &true.into())
        );
        let reason = told["reason"].as_str().unwrap();
        assert!(
            reason.starts_with("4 of 4 calls for the one model that was asked for in the last 60 s failed"),
            "{reason}"
        );
        assert_eq!((&told["health"]["status"], &told["health"]["failed_calls"]), (&"warn".into(), &4.into()), "{told}");
        assert!(told["health"]["last_failed_call"]["at"].is_string(), "{told}");
        let work = cluster.server(0).work();
        for turn in 0..4 {
            let answer = olol.chat("tiny", &format!("later {turn}")).await;
            assert_eq!((answer.server(), answer.header("x-olol-attempts")), ("1", ""), "{way:?}");
        }
        assert_eq!(cluster.server(0).work(), work);
        let page = olol.ask(&Request::get("/metrics")).await.text();
        assert!(page.contains("olol_server_state{server=\"0\"} 2\n"), "{page}");
        assert!(page.contains("olol_server_error_ratio{server=\"0\"} 1\n"), "{page}");
        let summary = olol.ask(&Request::get("/api/status")).await.json();
        assert_eq!(
            (&summary["olol"]["servers"]["up"], &summary["olol"]["servers"]["degraded"]),
            (&2.into(), &1.into())
        );
    }
}

#[tokio::test]
async fn what_clients_got_wrong_is_no_fault_of_the_server() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny");
        cluster.server(0).refuses(400, "invalid options");
        let olol = Olol::start(&cluster, RULES).await;
        for _ in 0..8 {
            assert_eq!(olol.chat("tiny", "hi").await.status, 400);
        }
        let told = first(&olol).await;
        assert_eq!((&told["state"], &told["health"]["calls"]), (&"up".into(), &0.into()), "{way:?}: {told}");
    }
}
