//! What Ollama shows of a model in the words of a Modelfile.

/// The parameters of a model, as `/api/show` writes them: a line for each, the key and behind it the value, which is JSON.
pub fn parameters(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.trim().split_once(char::is_whitespace)).map(|(key, value)| (key, value.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_stand_more_than_once() {
        let text = "num_ctx                        8192\nstop                           \"a b\"\nstop \"c\"\nodd\n";
        let wanted = [("num_ctx", "8192"), ("stop", "\"a b\""), ("stop", "\"c\"")];
        assert_eq!(parameters(text).collect::<Vec<_>>(), wanted);
    }
}
