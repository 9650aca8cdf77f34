//! The routes of an Ollama: which exist, how far each reaches in a cluster, and whose error form it speaks.
//!
//! The table is that of a real server (0.33); see the methods' order in `allow`, which is the order of its `Allow` header.

use http::Method;

/// One route of the Ollama API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// `GET|HEAD /`
    Root,
    /// `GET|HEAD /api/version`
    Version,
    /// `GET /api/status`
    Status,
    /// `GET|HEAD /api/tags`
    Tags,
    /// `GET /api/ps`
    Ps,
    /// `POST /api/show`
    Show,
    /// `POST /api/generate`
    Generate,
    /// `POST /api/chat`
    Chat,
    /// `POST /api/embed`
    Embed,
    /// `POST /api/embeddings`
    Embeddings,
    /// `POST /api/pull`
    Pull,
    /// `POST /api/push`
    Push,
    /// `POST /api/create`
    Create,
    /// `POST|HEAD /api/blobs/:digest`
    Blob,
    /// `POST /api/copy`
    Copy,
    /// `DELETE /api/delete`
    Delete,
    /// `POST /api/me`
    Me,
    /// `POST /api/signout`
    Signout,
    /// `DELETE /api/user/keys/:key`
    UserKey,
    /// `POST /api/experimental/web_search`
    WebSearch,
    /// `POST /api/experimental/web_fetch`
    WebFetch,
    /// `GET /api/experimental/model-recommendations`
    Recommendations,
    /// `POST /v1/chat/completions`
    V1Chat,
    /// `POST /v1/completions`
    V1Completions,
    /// `POST /v1/embeddings`
    V1Embeddings,
    /// `GET /v1/models`
    V1Models,
    /// `GET /v1/models/:model`
    V1Model,
    /// `POST /v1/responses`
    V1Responses,
    /// `POST /v1/audio/transcriptions`
    V1Audio,
    /// `POST /v1/messages`
    V1Messages,
}

/// How far a route reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The proxy answers itself.
    Local,
    /// One server answers: one that has the model.
    One,
    /// One server answers, the same for every call of this kind.
    Same,
    /// Every server is asked, the answers become one.
    Merge,
    /// Every server that it concerns is told.
    All,
}

/// Whose form an error has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error":"text"}`
    Ollama,
    /// `{"error":{"message":…,"type":…}}`
    OpenAi,
    /// `{"type":"error","error":{…},"request_id":…}`
    Anthropic,
}

impl Route {
    /// Every route, in the order of the table above.
    pub const ALL: [Self; 30] = [
        Self::Root,
        Self::Version,
        Self::Status,
        Self::Tags,
        Self::Ps,
        Self::Show,
        Self::Generate,
        Self::Chat,
        Self::Embed,
        Self::Embeddings,
        Self::Pull,
        Self::Push,
        Self::Create,
        Self::Blob,
        Self::Copy,
        Self::Delete,
        Self::Me,
        Self::Signout,
        Self::UserKey,
        Self::WebSearch,
        Self::WebFetch,
        Self::Recommendations,
        Self::V1Chat,
        Self::V1Completions,
        Self::V1Embeddings,
        Self::V1Models,
        Self::V1Model,
        Self::V1Responses,
        Self::V1Audio,
        Self::V1Messages,
    ];

    /// The route of a path, whatever the method. Paths are case-sensitive; a parameter is one segment, not empty.
    pub fn find(path: &str) -> Option<Self> {
        Some(match path {
            "/" => Self::Root,
            "/api/version" => Self::Version,
            "/api/status" => Self::Status,
            "/api/tags" => Self::Tags,
            "/api/ps" => Self::Ps,
            "/api/show" => Self::Show,
            "/api/generate" => Self::Generate,
            "/api/chat" => Self::Chat,
            "/api/embed" => Self::Embed,
            "/api/embeddings" => Self::Embeddings,
            "/api/pull" => Self::Pull,
            "/api/push" => Self::Push,
            "/api/create" => Self::Create,
            "/api/copy" => Self::Copy,
            "/api/delete" => Self::Delete,
            "/api/me" => Self::Me,
            "/api/signout" => Self::Signout,
            "/api/experimental/web_search" => Self::WebSearch,
            "/api/experimental/web_fetch" => Self::WebFetch,
            "/api/experimental/model-recommendations" => Self::Recommendations,
            "/v1/chat/completions" => Self::V1Chat,
            "/v1/completions" => Self::V1Completions,
            "/v1/embeddings" => Self::V1Embeddings,
            "/v1/models" => Self::V1Models,
            "/v1/responses" => Self::V1Responses,
            "/v1/audio/transcriptions" => Self::V1Audio,
            "/v1/messages" => Self::V1Messages,
            _ => {
                return [
                    ("/api/blobs/", Self::Blob),
                    ("/v1/models/", Self::V1Model),
                    ("/api/user/keys/", Self::UserKey),
                ]
                .into_iter()
                .find(|(prefix, _)| path.strip_prefix(prefix).is_some_and(|p| !p.is_empty() && !p.contains('/')))
                .map(|(_, route)| route);
            }
        })
    }

    /// The methods that the route takes, as its `Allow` header lists them.
    pub fn allow(self) -> &'static str {
        match self {
            Self::Root | Self::Version | Self::Tags => "HEAD, GET",
            Self::Status | Self::Ps | Self::Recommendations | Self::V1Models | Self::V1Model => "GET",
            Self::Delete | Self::UserKey => "DELETE",
            Self::Blob => "HEAD, POST",
            _ => "POST",
        }
    }

    /// Whether the route takes a method.
    pub fn takes(self, method: &Method) -> bool {
        let allow = self.allow();
        allow == method.as_str() || allow.split(", ").any(|allowed| allowed == method.as_str())
    }

    /// How far the route reaches.
    pub fn scope(self) -> Scope {
        match self {
            Self::Root => Scope::Local,
            Self::Version | Self::Status | Self::Tags | Self::Ps | Self::V1Models => Scope::Merge,
            Self::Pull | Self::Create | Self::Copy | Self::Delete | Self::Blob => Scope::All,
            Self::Me | Self::Signout | Self::UserKey | Self::Push => Scope::Same,
            _ => Scope::One,
        }
    }

    /// Whose error form the route speaks.
    pub fn dialect(self) -> Dialect {
        match self {
            Self::V1Messages => Dialect::Anthropic,
            Self::V1Chat
            | Self::V1Completions
            | Self::V1Embeddings
            | Self::V1Models
            | Self::V1Model
            | Self::V1Responses
            | Self::V1Audio => Dialect::OpenAi,
            _ => Dialect::Ollama,
        }
    }

    /// Whether the route runs a model: such a call may have to wait while one loads.
    pub fn infers(self) -> bool {
        matches!(
            self,
            Self::Generate
                | Self::Chat
                | Self::Embed
                | Self::Embeddings
                | Self::V1Chat
                | Self::V1Completions
                | Self::V1Embeddings
                | Self::V1Responses
                | Self::V1Audio
                | Self::V1Messages
        )
    }

    /// Whether the route can answer as a stream, token by token.
    pub fn streams(self) -> bool {
        matches!(
            self,
            Self::Generate | Self::Chat | Self::V1Chat | Self::V1Completions | Self::V1Responses | Self::V1Messages
        )
    }

    /// Whether sending a call twice does no harm when nothing is known of the first.
    pub fn is_idempotent(self) -> bool {
        self.infers()
            || matches!(self.scope(), Scope::Local | Scope::Merge)
            || matches!(self, Self::Show | Self::V1Model | Self::Recommendations)
    }

    /// The word for it in the configuration.
    pub fn word(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Version => "version",
            Self::Status => "status",
            Self::Tags => "tags",
            Self::Ps => "ps",
            Self::Show => "show",
            Self::Generate => "generate",
            Self::Chat => "chat",
            Self::Embed => "embed",
            Self::Embeddings => "embeddings",
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Create => "create",
            Self::Blob => "blobs",
            Self::Copy => "copy",
            Self::Delete => "delete",
            Self::Me => "me",
            Self::Signout => "signout",
            Self::UserKey => "user-keys",
            Self::WebSearch => "web-search",
            Self::WebFetch => "web-fetch",
            Self::Recommendations => "model-recommendations",
            Self::V1Chat => "v1-chat",
            Self::V1Completions => "v1-completions",
            Self::V1Embeddings => "v1-embeddings",
            Self::V1Models => "v1-models",
            Self::V1Model => "v1-model",
            Self::V1Responses => "v1-responses",
            Self::V1Audio => "v1-audio",
            Self::V1Messages => "v1-messages",
        }
    }

    /// The word for logs and metrics: the path, parameters left out.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Root => "/",
            Self::Version => "/api/version",
            Self::Status => "/api/status",
            Self::Tags => "/api/tags",
            Self::Ps => "/api/ps",
            Self::Show => "/api/show",
            Self::Generate => "/api/generate",
            Self::Chat => "/api/chat",
            Self::Embed => "/api/embed",
            Self::Embeddings => "/api/embeddings",
            Self::Pull => "/api/pull",
            Self::Push => "/api/push",
            Self::Create => "/api/create",
            Self::Blob => "/api/blobs/:digest",
            Self::Copy => "/api/copy",
            Self::Delete => "/api/delete",
            Self::Me => "/api/me",
            Self::Signout => "/api/signout",
            Self::UserKey => "/api/user/keys/:key",
            Self::WebSearch => "/api/experimental/web_search",
            Self::WebFetch => "/api/experimental/web_fetch",
            Self::Recommendations => "/api/experimental/model-recommendations",
            Self::V1Chat => "/v1/chat/completions",
            Self::V1Completions => "/v1/completions",
            Self::V1Embeddings => "/v1/embeddings",
            Self::V1Models => "/v1/models",
            Self::V1Model => "/v1/models/:model",
            Self::V1Responses => "/v1/responses",
            Self::V1Audio => "/v1/audio/transcriptions",
            Self::V1Messages => "/v1/messages",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_found_by_its_own_path() {
        for route in Route::ALL {
            let path = route.as_str().replace(":digest", "sha256:00").replace(":key", "k").replace(":model", "tiny");
            assert_eq!(Route::find(&path), Some(route));
        }
    }

    #[test]
    fn a_parameter_is_one_segment_that_is_not_empty() {
        assert_eq!(Route::find("/v1/models/"), None);
        assert_eq!(Route::find("/v1/models/a/b"), None);
        assert_eq!(Route::find("/API/tags"), None);
    }
}
