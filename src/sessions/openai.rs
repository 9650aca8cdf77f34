//! Messages as OpenAI's clients write them, and as they are kept: in Ollama's form. A session is one, whichever route goes on
//! with it.

use serde_json::{Map, Value, json};

/// A message of `/v1/chat/completions`, as it is kept.
pub(super) fn kept(message: &Value) -> Value {
    let mut object = Map::new();
    let role = &message["role"];
    object.insert("role".to_owned(), role.clone());
    let (mut texts, mut images) = (Vec::new(), Vec::new());
    match &message["content"] {
        Value::Array(parts) => {
            for part in parts {
                texts.extend(part["text"].as_str());
                let url = part["image_url"]["url"].as_str().or_else(|| part["image_url"].as_str());
                // Addresses of others are Ollama's to refuse.
                images.extend(url.and_then(|url| url.split_once(";base64,")).map(|(_, data)| json!(data)));
            }
        }
        content => texts.extend(content.as_str()),
    }
    object.insert("content".to_owned(), texts.join("\n").into());
    if !images.is_empty() {
        object.insert("images".to_owned(), images.into());
    }
    take(message, "reasoning", &mut object, "thinking");
    take(message, "tool_call_id", &mut object, "tool_call_id");
    if role == "tool" {
        take(message, "name", &mut object, "tool_name");
    }
    let calls = message["tool_calls"].as_array().into_iter().flatten().map(|call| {
        let function = &call["function"];
        let arguments = match function["arguments"].as_str() {
            Some(text) => serde_json::from_str(text).unwrap_or_else(|_| json!({})),
            None => function["arguments"].clone(),
        };
        let mut kept = json!({"function": {"name": function["name"], "arguments": arguments}});
        if call["id"].is_string() {
            kept["id"] = call["id"].clone();
        }
        kept
    });
    let calls: Vec<Value> = calls.collect();
    if !calls.is_empty() {
        object.insert("tool_calls".to_owned(), calls.into());
    }
    Value::Object(object)
}

/// A message that is kept, for `/v1/chat/completions`.
pub(super) fn told(message: &Value) -> Value {
    let mut object = Map::new();
    object.insert("role".to_owned(), message["role"].clone());
    let images = message["images"].as_array().map_or(&[][..], Vec::as_slice);
    let content = if images.is_empty() {
        message["content"].clone()
    } else {
        let text = json!({"type": "text", "text": message["content"]});
        let images = images.iter().filter_map(Value::as_str).map(|data| {
            let url = format!("data:image/{};base64,{data}", kind(data));
            json!({"type": "image_url", "image_url": {"url": url}})
        });
        std::iter::once(text).chain(images).collect()
    };
    object.insert("content".to_owned(), content);
    take(message, "thinking", &mut object, "reasoning");
    take(message, "tool_call_id", &mut object, "tool_call_id");
    take(message, "tool_name", &mut object, "name");
    let calls = message["tool_calls"].as_array().into_iter().flatten().enumerate().map(|(at, call)| {
        let function = &call["function"];
        let id = call["id"].as_str().map_or_else(|| format!("call_{at}"), str::to_owned);
        let arguments = function["arguments"].to_string();
        json!({"id": id, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    });
    let calls: Vec<Value> = calls.collect();
    if !calls.is_empty() {
        object.insert("tool_calls".to_owned(), calls.into());
    }
    Value::Object(object)
}

fn take(from: &Value, key: &str, to: &mut Map<String, Value>, name: &str) {
    if let Some(text) = from[key].as_str().filter(|text| !text.is_empty()) {
        to.insert(name.to_owned(), text.into());
    }
}

/// The kind of a picture, by how its base64 begins.
fn kind(data: &str) -> &'static str {
    match data {
        _ if data.starts_with("/9j/") => "jpeg",
        _ if data.starts_with("UklGR") => "webp",
        _ => "png",
    }
}

/// The options of a session that this route has, under its names.
pub(super) fn options(options: &Map<String, Value>) -> Map<String, Value> {
    const NAMES: [(&str, &str); 7] = [
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("seed", "seed"),
        ("stop", "stop"),
        ("frequency_penalty", "frequency_penalty"),
        ("presence_penalty", "presence_penalty"),
        ("num_predict", "max_tokens"),
    ];
    NAMES.iter().filter_map(|(ours, theirs)| Some(((*theirs).to_owned(), options.get(*ours)?.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_again_is_what_was_said() {
        for message in [
            json!({"role": "user", "content": "hi"}),
            json!({"role": "user", "content": "look\nhere", "images": ["iVBORw0KGgo=", "/9j/4AAQ"]}),
            json!({"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
                {"id": "call_7", "function": {"name": "f", "arguments": {"a": [1, "b"]}}}]}),
            json!({"role": "tool", "content": "7", "tool_name": "f", "tool_call_id": "call_7"}),
        ] {
            assert_eq!(kept(&told(&message)), message);
        }
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"},
            {"type": "image_url", "image_url": {"url": "http://elsewhere/x.png"}}]});
        assert_eq!(kept(&parts), json!({"role": "user", "content": "a\nb"}));
        let call = json!({"role": "assistant", "content": null, "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": "no json"}}]});
        assert_eq!(kept(&call)["tool_calls"][0]["function"]["arguments"], json!({}));
        let unnamed =
            json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]});
        assert_eq!(
            told(&unnamed)["tool_calls"][0],
            json!({"id": "call_0", "type": "function", "function": {"name": "f", "arguments": "{}"}})
        );
    }

    #[test]
    fn nonsense_is_a_message_without_words() {
        for message in [json!(null), json!([]), json!({"role": 1, "content": {"a": 1}, "tool_calls": [1, null]})] {
            let kept = kept(&message);
            assert_eq!(kept["content"], "");
            told(&kept);
        }
    }
}
