//! Every order of layers that the rules allow really runs: each serves, and lives through a server that dies.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::{Answer, Cluster, Ending, Olol, until};
use olol_middleware::stack::{Concern, Order};
use serde_json::{Value, json};

/// More layers than this have too many orders to try them all.
const FEW: usize = 4;
/// How many orders are tried then.
const SAMPLE: usize = 150;
/// Layers that are off unless something is said have it said.
const ON: &str = "hedge.on = [\"embed\"]\ndistribute.policy = \"always\"";

#[tokio::test]
async fn every_order_that_the_rules_allow_serves_and_lives_through_a_server_that_dies() {
    let seed = fastrand::u64(..);
    let orders = if Concern::ALL.len() <= FEW { all() } else { sample(seed, SAMPLE) };
    assert!(orders.len() > 40, "{} orders", orders.len());
    for order in orders {
        let named: Vec<&str> = order.iter().map(|layer| layer.as_str()).collect();
        let case = format!("{named:?} (seed {seed})");
        let cluster = Cluster::of(2).await.all_have_loaded("tiny");
        let olol = Olol::start(&cluster, &format!("stack.order = {}\n{ON}", json!(named))).await;
        let whole = olol.chat("tiny", "hi").await;
        assert_eq!(
            (whole.status, whole.said().as_str(), whole.ending),
            (200, "Hello world", Ending::LastChunk),
            "{case}"
        );
        cluster.server(0).dies_after(["Hel"]);
        for _ in 0..3 {
            ends_well(&olol.chat("tiny", "hi").await, &case);
        }
        cluster.server(0).dies_before_head();
        for _ in 0..3 {
            let answer = olol.chat("tiny", "hi").await;
            if order.contains(&Concern::Retry) {
                assert_eq!((answer.status, answer.said().as_str()), (200, "Hello world"), "{case}");
            } else {
                ends_well(&answer, &case);
            }
        }
        let status = olol.get("/api/status").await.json();
        assert_eq!(status["olol"]["stack"], json!(named));
        until("every place is free again", || olol.in_flight(0) + olol.in_flight(1) == 0).await;
    }
}

#[test]
fn orders_that_the_rules_forbid_are_refused() {
    let mut default = Concern::ALL.to_vec();
    assert!(Order::try_from(default.clone()).is_ok(), "the default order is one that works");
    default.reverse();
    assert!(Order::try_from(default).is_err());
}

#[test]
fn a_sample_is_of_allowed_orders() {
    let orders = sample(1, 30);
    assert!(orders.len() == 30 && orders.iter().all(|order| is_allowed(order)));
    assert!(orders.iter().any(|order| !Concern::ALL.starts_with(order)));
}

/// Whether an answer is one that a client can understand: whole, broken off with a word on it, or refused with one.
fn ends_well(answer: &Answer, case: &str) {
    let last = answer.lines().last().cloned().unwrap_or_default();
    let is_told = last["error"].is_string();
    match answer.status {
        200 => assert!(
            (is_told || last["done"] == Value::Bool(true)) && answer.ending == Ending::LastChunk,
            "{case}: {last}"
        ),
        status => assert!(is_told && status == 502, "{case}: {status} {last}"),
    }
}

fn is_allowed(order: &[Concern]) -> bool {
    Order::try_from(order.to_vec()).is_ok()
}

/// Every allowed order of every choice of layers. The rules are about pairs, so what begins wrong ends wrong.
fn all() -> Vec<Vec<Concern>> {
    let mut orders = vec![Vec::new()];
    let mut at = 0;
    while let Some(begin) = orders.get(at).cloned() {
        for layer in Concern::ALL {
            let longer = [&begin[..], &[layer]].concat();
            if is_allowed(&longer) {
                orders.push(longer);
            }
        }
        at += 1;
    }
    orders
}

/// Some of them: layers of the default order at random, exchanged with their neighbours again and again where that is
/// allowed. Every allowed order can be reached so.
fn sample(seed: u64, wanted: usize) -> Vec<Vec<Concern>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut orders = vec![Concern::ALL.to_vec(), Vec::new()];
    // There may not be so many.
    for _ in 0..wanted * 100 {
        if orders.len() >= wanted {
            break;
        }
        let share = random.f64();
        let mut order: Vec<Concern> = Concern::ALL.into_iter().filter(|_| random.f64() <= share).collect();
        for _ in 0..order.len() * order.len() * 4 {
            let at = random.usize(..order.len().saturating_sub(1).max(1));
            if at + 1 < order.len() {
                order.swap(at, at + 1);
                if !is_allowed(&order) {
                    order.swap(at, at + 1);
                }
            }
        }
        if !orders.contains(&order) {
            orders.push(order);
        }
    }
    orders
}
