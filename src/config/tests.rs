//! What is said of files that are no good, as people read it; and where the values of good ones come from.

use std::path::Path;

use insta::assert_snapshot;

use super::*;

/// What is said of a file with this text. What grows with every new layer is cut short.
fn error(text: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("olol.toml");
    std::fs::write(&path, text).unwrap();
    let error = Config::read(&path).expect_err(text).to_string().replace(&format!("{}/", folder.path().display()), "");
    let cut = |line: &str| match line.split_once(": ") {
        Some((begin @ ("the layers" | "what may stand here"), _)) => format!("{begin}: …"),
        _ => line.to_owned(),
    };
    error.lines().map(cut).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_documented_file_holds_every_default() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/olol.toml");
    assert_eq!(Config::read(&path).unwrap(), Config::default());
}

#[test]
fn a_misspelt_key() {
    assert_snapshot!(error("[proxy]\nprot = 1\n"), @r"
    olol.toml: line 2, column 1: unknown key `prot` in [proxy]; did you mean `port`?
      |
    2 | prot = 1
      | ^^^^
    the keys of [proxy]: host, port, servers, threads, origins, trusted-proxies
    ");
}

#[test]
fn a_misspelt_layer() {
    assert_snapshot!(error("[stack]\norder = [\"trace\", \"retyr\"]\n"), @r#"
    olol.toml: line 2, column 19: unknown layer `retyr`; did you mean `retry`?
      |
    2 | order = ["trace", "retyr"]
      |                   ^^^^^^^
    the layers: …
    "#);
}

#[test]
fn a_layer_with_another_hyphen() {
    assert_snapshot!(error("[stack]\norder = [\n    \"trace\",\n    \"model_route\",\n]\n"), @r#"
    olol.toml: line 4, column 5: unknown layer `model_route`; did you mean `model-route`?
      |
    4 |     "model_route",
      |     ^^^^^^^^^^^^^
    the layers: …
    "#);
}

#[test]
fn the_table_of_a_layer_with_another_hyphen() {
    assert_snapshot!(error("# Routing.\n[model_route]\nspill-after = 1\n"), @r"
    olol.toml: line 2, column 2: unknown key `model_route`; did you mean `model-route`?
      |
    2 | [model_route]
      |  ^^^^^^^^^^^
    what may stand here: …
    ");
}

#[test]
fn a_word_that_is_near_to_nothing() {
    assert_snapshot!(error("[limits]\nfrobnicate = 1\n"), @r"
    olol.toml: line 2, column 1: unknown key `frobnicate` in [limits]
      |
    2 | frobnicate = 1
      | ^^^^^^^^^^
    the keys of [limits]: body-memory, body-pause-s, grace-s
    ");
}

#[test]
fn a_key_of_another_table() {
    assert_snapshot!(error("[stack]\nport = 11434\n"), @r"
    olol.toml: line 2, column 1: unknown key `port` in [stack]; `port` is a key of [proxy]
      |
    2 | port = 11434
      | ^^^^
    the keys of [stack]: order
    ");
}

#[test]
fn a_quantization_that_there_is_not() {
    let wrong = error("[quant-fallback.accept]\nq4_0 = [\"q4_0\", \"q5_K_N\"]\n");
    assert_snapshot!(wrong.lines().take(4).collect::<Vec<_>>().join("\n"), @r#"
    olol.toml: line 2, column 8: quant-fallback.accept.q4_0: unknown word `q5_K_N`; did you mean `q5_k_m`?
      |
    2 | q4_0 = ["q4_0", "q5_K_N"]
      |        ^^^^^^^^^^^^^^^^^^
    "#);
}

#[test]
fn a_quantization_that_stands_twice() {
    assert_snapshot!(error("[quant-fallback]\nladder = [\"q4_0\", \"Q4_0\"]\n"), @r#"
    olol.toml: line 2, column 10: quant-fallback.ladder: q4_0 stands twice: a level has one place on the ladder
      |
    2 | ladder = ["q4_0", "Q4_0"]
      |          ^^^^^^^^^^^^^^^^
    "#);
}

#[test]
fn a_key_before_its_table() {
    assert_snapshot!(error("port = 11434\n"), @r"
    olol.toml: line 1, column 1: unknown key `port`; `port` is a key of [proxy]
      |
    1 | port = 11434
      | ^^^^
    what may stand here: …
    ");
}

#[test]
fn a_key_of_a_layer_that_has_none() {
    assert_snapshot!(error("[metrics]\nenabled = true\n"), @r"
    olol.toml: line 2, column 1: unknown key `enabled` in [metrics]
      |
    2 | enabled = true
      | ^^^^^^^
    [metrics] has no keys
    ");
}

#[test]
fn an_order_that_would_do_harm() {
    assert_snapshot!(error("[stack]\norder = [\n    \"trace\",\n    \"retry\",\n    \"model-route\",\n]\n"), @r#"
    olol.toml: line 5, column 5: stack.order has 'retry' before 'model-route', but 'model-route' must come first: a retry must choose among the servers that have the model, and a server that says 404 is not a failed attempt
      |
    5 |     "model-route",
      |     ^^^^^^^^^^^^^
    "#);
}

#[test]
fn a_layer_that_stands_twice() {
    assert_snapshot!(error("[stack]\norder = [\"retry\", \"trace\", \"retry\"]\n"), @r#"
    olol.toml: line 2, column 28: stack.order names 'retry' twice: a layer can be in the stack once
      |
    2 | order = ["retry", "trace", "retry"]
      |                            ^^^^^^^
    "#);
}

#[test]
fn an_order_that_is_no_list() {
    assert_snapshot!(error("[stack]\norder = \"trace\"\n"), @r#"
    olol.toml: line 2, column 9: stack.order: invalid type: text "trace", expected a list in brackets
      |
    2 | order = "trace"
      |         ^^^^^^^
    "#);
}

#[test]
fn a_table_that_is_none() {
    assert_snapshot!(error("stack = [\"trace\"]\n"), @r#"
    olol.toml: line 1, column 9: `stack` is a table: its keys stand below [stack]
      |
    1 | stack = ["trace"]
      |         ^^^^^^^^^
    "#);
}

#[test]
fn a_number_as_a_text() {
    assert_snapshot!(error("[retry]\nattempts = \"three\"\n"), @r#"
    olol.toml: line 2, column 12: retry.attempts: invalid type: text "three", expected a whole number from 1 to 4294967295
      |
    2 | attempts = "three"
      |            ^^^^^^^
    "#);
}

#[test]
fn no_attempts_at_all() {
    assert_snapshot!(error("[retry]\nattempts = 0\n"), @r"
    olol.toml: line 2, column 12: retry.attempts: invalid value: number `0`, expected a whole number from 1 to 4294967295
      |
    2 | attempts = 0
      |            ^
    ");
}

#[test]
fn a_budget_above_the_whole() {
    assert_snapshot!(error("[retry]\nbudget = 7.5\n"), @r"
    olol.toml: line 2, column 10: retry.budget: invalid value: `7.5`, expected a number from 0 to 1
      |
    2 | budget = 7.5
      |          ^^^
    ");
}

#[test]
fn a_budget_that_is_no_number() {
    assert_snapshot!(error("[retry]\nbudget = nan\n"), @r"
    olol.toml: line 2, column 10: retry.budget: invalid value: `NaN`, expected a number from 0 to 1
      |
    2 | budget = nan
      |          ^^^
    ");
}

#[test]
fn less_than_nothing() {
    assert_snapshot!(error("[retry]\nreserve = -1\n"), @r"
    olol.toml: line 2, column 11: retry.reserve: invalid value: number `-1`, expected a whole number from 0 to 4294967295
      |
    2 | reserve = -1
      |           ^^
    ");
}

#[test]
fn a_port_that_is_none() {
    assert_snapshot!(error("[proxy]\nport = 70000\n"), @r"
    olol.toml: line 2, column 8: proxy.port: invalid value: number `70000`, expected a whole number from 0 to 65535
      |
    2 | port = 70000
      |        ^^^^^
    ");
}

#[test]
fn a_time_without_end() {
    assert_snapshot!(error("[limits]\nbody-pause-s = 9223372036854775807\n"), @r"
    olol.toml: line 2, column 16: limits.body-pause-s: invalid value: number `9223372036854775807`, expected a whole number from 1 to 31536000
      |
    2 | body-pause-s = 9223372036854775807
      |                ^^^^^^^^^^^^^^^^^^^
    ");
}

#[test]
fn no_pause_between_checks() {
    assert_snapshot!(error("[pool]\ncheck-interval-ms = 0\n"), @r"
    olol.toml: line 2, column 21: pool.check-interval-ms: invalid value: number `0`, expected a whole number from 1 to 31536000000
      |
    2 | check-interval-ms = 0
      |                     ^
    ");
}

#[test]
fn too_many_threads() {
    assert_snapshot!(error("threads = 4\nproxy = { threads = 100000 }\n"), @r"
    olol.toml: line 2, column 21: proxy.threads: invalid value: number `100000`, expected a whole number from 0 to 1024
      |
    2 | proxy = { threads = 100000 }
      |                     ^^^^^^
    ");
}

#[test]
fn yes_as_a_number() {
    assert_snapshot!(error("trace.access-log = 1\n"), @r"
    olol.toml: line 1, column 20: trace.access-log: invalid type: number `1`, expected true or false
      |
    1 | trace.access-log = 1
      |                    ^
    ");
}

#[test]
fn a_server_that_is_none() {
    assert_snapshot!(error("[proxy]\nservers = [\n    \"gpu1:50051\",\n    \"gpu2:fast\",\n]\n"), @r#"
    olol.toml: line 4, column 5: proxy.servers[1]: 'gpu2:fast' is not an address: 'fast' is no port (1 to 65535)
      |
    4 |     "gpu2:fast",
      |     ^^^^^^^^^^^
    "#);
}

#[test]
fn a_server_that_stands_twice() {
    assert_snapshot!(error("[proxy]\nservers = [\"gpu1\", \"gpu1\"]\n"), @r#"
    olol.toml: line 2, column 20: proxy.servers[1]: server 'gpu1:50051' stands twice in the list ('gpu1:50051')
      |
    2 | servers = ["gpu1", "gpu1"]
      |                    ^^^^^^
    "#);
}

#[test]
fn an_origin_with_two_stars() {
    assert_snapshot!(error("[proxy]\norigins = [\"https://*.example.*\"]\n"), @r#"
    olol.toml: line 2, column 12: proxy.origins[0]: 'https://*.example.*' has more than one '*'
      |
    2 | origins = ["https://*.example.*"]
      |            ^^^^^^^^^^^^^^^^^^^^^
    "#);
}

#[test]
fn a_rule_that_says_nothing() {
    assert_snapshot!(error("[[alias.rules]]\nservers = [\"a\"]\n\n[[alias.rules]]\nmodels = [\"big*\"]\n"), @r"
    olol.toml: line 4, column 1: alias.rules[1]: it must say something of servers: 'servers', 'tiers' or 'weights'
      |
    4 | [[alias.rules]]
      | ^^^^^^^^^^^^^^^
    ");
}

#[test]
fn a_rule_for_a_server_that_there_is_not() {
    let rules = "[proxy]\nservers = [\"gpu1@a:1\", \"attic@b:1\"]\n[[alias.rules]]\nmodels = [\"big*\"]\nservers = [\"gpu2\"]\n";
    for more in ["", "[discovery]\nmdns = false\n"] {
        let config: Config = toml::from_str(&format!("{rules}{more}")).unwrap();
        let told = "alias.rules[0].servers[0]: no server fits `gpu2` now; did you mean `gpu1`?";
        assert_eq!((config.validate().is_ok(), config.oddities()), (true, vec![told.to_owned()]), "it may dial in");
    }
}

#[test]
fn a_name_that_stands_for_what_it_does_not_have() {
    assert_snapshot!(error("[alias.models]\na = \"tiny\"\n\"b-*\" = [\"tiny\", \"$2\"]\n"), @r#"
    olol.toml: line 3, column 9: alias.models."b-*": it cannot stand for '$2': it has 1 '*', so there is no '$2'
      |
    3 | "b-*" = ["tiny", "$2"]
      |         ^^^^^^^^^^^^^^
    "#);
}

#[test]
fn a_limit_for_a_route_that_there_is_not() {
    let text = error("[[timeout.rules]]\nroutes = [\"chat\", \"embedd\"]\nidle-s = 1\n");
    assert_snapshot!(text.lines().take(4).collect::<Vec<_>>().join("\n"), @r#"
    olol.toml: line 2, column 19: timeout.rules[0].routes[1]: unknown word `embedd`; did you mean `embed`?
      |
    2 | routes = ["chat", "embedd"]
      |                   ^^^^^^^^
    "#);
}

#[test]
fn a_limit_below_nothing() {
    assert_snapshot!(error("[timeout]\nidle-s = -1\n"), @r"
    olol.toml: line 2, column 10: timeout.idle-s: invalid value: number `-1.0`, expected a number of seconds, a year at most, or 0 for no limit
      |
    2 | idle-s = -1
      |          ^^
    ");
}

#[test]
fn rules_are_compared_with_the_servers_that_somebody_named() {
    let mut config: Config = toml::from_str("[[alias.rules]]\nservers = [\"gpu1\", \"x-*\"]").unwrap();
    config.discovery.mdns = false;
    assert!(config.validate().is_ok() && config.oddities().is_empty(), "nobody knows yet who there is");
    config.proxy.servers = vec!["gpu1@a:1".to_owned()];
    assert!(config.validate().is_ok());
    assert_eq!(config.oddities(), ["alias.rules[0].servers[1]: no server fits `x-*` now"]);
    config.proxy.servers = vec!["gpu2@a:1".to_owned()];
    assert!(config.validate().is_ok(), "it may dial in");
    assert_eq!(config.oddities()[0], "alias.rules[0].servers[0]: no server fits `gpu1` now; did you mean `gpu2`?");
}

#[test]
fn what_is_no_toml() {
    assert_snapshot!(error("[proxy]\nhost = localhost\n"), @r"
    olol.toml: line 2, column 8: string values must be quoted, expected literal string
      |
    2 | host = localhost
      |        ^^^^^^^^^
    ");
}

#[test]
fn a_key_that_stands_twice() {
    assert_snapshot!(error("[proxy]\nport = 1\nport = 2\n"), @r"
    olol.toml: line 3, column 1: duplicate key
      |
    3 | port = 2
      | ^^^^
    ");
}

/// The keys that a text of TOML sets.
fn keys(text: &str) -> Vec<String> {
    fn collect(place: &str, value: &toml::Value, keys: &mut Vec<String>) {
        match value {
            toml::Value::Table(table) => table.iter().for_each(|(name, value)| {
                let dot = if place.is_empty() { "" } else { "." };
                collect(&format!("{place}{dot}{name}"), value, keys);
            }),
            _ => keys.push(place.to_owned()),
        }
    }
    let mut found = Vec::new();
    collect("", &toml::Value::Table(toml::from_str(text).unwrap()), &mut found);
    found
}

#[test]
fn every_key_of_the_documented_file_is_told_with_its_line() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/olol.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let settings = Source::of(&path).read().unwrap().settings().unwrap();
    let told = |key: &str| settings.iter().find(|setting| setting.key.to_string() == key);
    let keys = keys(&text);
    assert!(keys.len() > 20, "{keys:?}");
    for key in keys {
        let setting = told(&key).unwrap_or_else(|| panic!("{key} is not told"));
        let name = key.rsplit('.').next().unwrap();
        match &setting.origins[..] {
            [Origin::File(_, line)] => {
                assert!(text.lines().nth(line - 1).unwrap().starts_with(name), "{key} in line {line}");
            }
            // An empty list of servers is as good as none.
            other => assert!(key == "proxy.servers" && other == [Origin::Default], "{key}: {other:?}"),
        }
    }
}

#[test]
fn each_value_is_told_with_what_it_was_set_by() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("olol.toml");
    std::fs::write(&path, "[retry]\nattempts = 5\n\n[proxy]\nport = 1\nhost = \"::1\"\norigins = [\"https://a\"]\n")
        .unwrap();
    let source = Source::of(&path)
        .with(Set::Port(7), Origin::Environment("OLOL_PORT"))
        .with(Set::Threads(Threads::new(2)), Origin::Flag("--threads"))
        .with(Set::Origins(vec!["https://b".to_owned()]), Origin::Environment("OLLAMA_ORIGINS"));
    let settings = source.read().unwrap().settings().unwrap();
    let told = |key: &str| {
        let setting = settings.iter().find(|setting| setting.key.to_string() == key).unwrap();
        let origins: Vec<String> = setting.origins.iter().map(ToString::to_string).collect();
        let origins = origins.join(" and ").replace(path.to_str().unwrap(), "FILE");
        format!("{} from {origins}", setting.value)
    };
    for (key, wanted) in [
        ("retry.attempts", "5 from FILE:2"),
        ("retry.reserve", "100 from default"),
        ("proxy.host", "\"::1\" from FILE:6"),
        ("proxy.port", "7 from environment variable OLOL_PORT"),
        ("threads", "2 from flag --threads"),
        ("proxy.threads", "2 from flag --threads"),
        ("proxy.servers", "[\"localhost:50051\"] from default"),
        ("proxy.origins", "[\"https://a\", \"https://b\"] from FILE:7 and environment variable OLLAMA_ORIGINS"),
    ] {
        assert_eq!(told(key), wanted, "{key}");
    }
}

#[test]
fn an_origin_in_the_file_is_not_blamed_on_the_environment() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "proxy.origins = [\"https://a\"]\n").unwrap();
    let source = |origin: &str| {
        let origins = Set::Origins(vec![origin.to_owned()]);
        Source::of(file.path()).with(origins, Origin::Environment("OLLAMA_ORIGINS")).read()
    };
    assert!(source("https://b").is_ok());
    let error = source("*b*").unwrap_err().to_string();
    assert!(error.starts_with("environment variable OLLAMA_ORIGINS: '*b*'"), "{error}");
    std::fs::write(file.path(), "proxy.origins = [\"*a*\"]\n").unwrap();
    let error = source("https://b").unwrap_err().to_string();
    assert!(error.contains("line 1, column 18: proxy.origins[0]: '*a*'"), "{error}");
}

#[test]
fn a_flag_for_threads_goes_before_both_keys() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("olol.toml");
    std::fs::write(&path, "[proxy]\nthreads = 4\n").unwrap();
    let threads = |source: Source| source.read().unwrap().config.worker_threads();
    assert_eq!(threads(Source::of(&path)), 4);
    assert_eq!(threads(Source::of(&path).with(Set::Threads(Threads::new(1)), Origin::Flag("--threads"))), 1);
}

#[test]
fn what_a_flag_says_is_blamed_on_the_flag() {
    let wrong = Source::default().with(Set::Servers(vec!["a:b".to_owned()]), Origin::Flag("--servers"));
    assert_snapshot!(wrong.read().unwrap_err(), @"flag --servers: 'a:b' is not an address: 'b' is no port (1 to 65535)");
}

#[test]
fn a_policy_that_lacks_a_number() {
    assert_snapshot!(error("[distribute]\npolicy = \"when-too-big\"\n"), @r#"
    olol.toml: line 2, column 10: distribute.policy: it needs too-big-gib, from which size on a model is too big: servers do not tell how much they can hold
      |
    2 | policy = "when-too-big"
      |          ^^^^^^^^^^^^^^
    "#);
    assert_snapshot!(error("[[distribute.rules]]\nmodels = [\"big\"]\n"), @r"
    olol.toml: line 1, column 1: distribute.rules[0]: it must say something of them: policy, too-big-gib or min-workers
      |
    1 | [[distribute.rules]]
      | ^^^^^^^^^^^^^^^^^^^^
    ");
}

#[test]
fn a_route_that_is_never_asked_twice() {
    assert_snapshot!(error("[hedge]\non = [\"embed\", \"chat\"]\n"), @r#"
    olol.toml: line 2, column 16: hedge.on[1]: unknown word `chat`
      |
    2 | on = ["embed", "chat"]
      |                ^^^^^^
    the words that may stand here: embed, embeddings, v1-embeddings, show, v1-model
    "#);
}
