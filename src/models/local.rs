//! What an agent does with models: it gives others those of its Ollama, and has its Ollama copy theirs.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, BytesMut};
use futures_util::stream::{self, BoxStream};
use olol_middleware::{Error, ModelName, Reply};
use olol_proto::v1::{
    CopyModelRequest, CopyModelResponse, CopyOrder, ReadBlobRequest, ReadBlobResponse, ReadModelRequest,
    ReadModelResponse,
};
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use tonic::{Status, Streaming};

use super::copy::Copier;
use super::store::{Digest, Store, StoreError};

/// Bytes of a blob in one message.
const PIECE: usize = 256 << 10;

/// Where the folder of the models is: asked anew each time, since an Ollama without models does not tell.
pub type Folder = Arc<dyn Fn(String) -> futures_util::future::BoxFuture<'static, Option<PathBuf>> + Send + Sync>;

/// The models of one agent.
#[derive(Clone)]
pub struct Local {
    folder: Folder,
    /// Where they were when a manifest was asked for last: blobs are asked for after that.
    last: Arc<Mutex<Option<PathBuf>>>,
    copier: Copier,
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Local").field("copier", &self.copier).finish_non_exhaustive()
    }
}

impl Local {
    /// Those of an Ollama: `folder` finds where they are, given one of them.
    pub fn new(folder: Folder, copier: Copier) -> Self {
        Self { folder, last: Arc::default(), copier }
    }

    /// A manifest.
    pub async fn manifest(&self, request: ReadModelRequest) -> Result<ReadModelResponse, Status> {
        let digest =
            if request.digest.is_empty() { None } else { Some(Digest::parse(&request.digest).map_err(refused)?) };
        let store = self.store(&request.model).await?;
        let reading = beside(move || store.manifest(&request.model, digest.as_ref()));
        Ok(ReadModelResponse { manifest: reading.await?.bytes })
    }

    /// A part of a blob.
    pub async fn blob(
        &self,
        request: ReadBlobRequest,
    ) -> Result<BoxStream<'static, Result<ReadBlobResponse, Status>>, Status> {
        let digest = Digest::parse(&request.digest).map_err(refused)?;
        let store = self.store("").await?;
        let (file, length) = beside(move || store.blob(&digest, request.offset)).await?;
        let all = length - request.offset;
        let left = if request.length == 0 { all } else { request.length.min(all) };
        Ok(Box::pin(stream::try_unfold((File::from_std(file), left), |(mut file, left)| async move {
            if left == 0 {
                return Ok(None);
            }
            let wanted = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
            let mut piece = BytesMut::with_capacity(wanted).limit(wanted);
            let read = file.read_buf(&mut piece).await.map_err(|error| Status::data_loss(error.to_string()))?;
            if read == 0 {
                return Err(Status::data_loss("the file became shorter"));
            }
            let data = piece.into_inner().freeze();
            Ok(Some((ReadBlobResponse { data }, (file, left - read as u64))))
        })))
    }

    /// Copies a model of others.
    pub fn copy(
        &self,
        order: CopyOrder,
        answers: Streaming<CopyModelRequest>,
    ) -> BoxStream<'static, Result<CopyModelResponse, Status>> {
        self.copier.copy(order, answers)
    }

    async fn store(&self, model: &str) -> Result<Store, Status> {
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let known = last().clone().filter(|_| model.is_empty());
        let found = match known {
            None => (self.folder)(model.to_owned()).await,
            known => known,
        };
        last().clone_from(&found);
        let folder = found.ok_or_else(|| {
            Status::failed_precondition(
                "the folder of its Ollama's models is not to be seen from the agent; run both on one machine, and not in a \
                 container that hides it",
            )
        })?;
        Ok(Store::at(&folder))
    }
}

/// Waits for the disk beside the runtime.
async fn beside<T: Send + 'static>(
    reading: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    let read = tokio::task::spawn_blocking(reading).await;
    read.map_err(|error| Status::internal(error.to_string()))?.map_err(refused)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn refused(error: StoreError) -> Status {
    let text = error.to_string();
    match error {
        StoreError::Name(_) | StoreError::Digest(_) => Status::invalid_argument(text),
        StoreError::Missing(_) | StoreError::Another { .. } => Status::not_found(text),
        StoreError::Broken { .. } => Status::data_loss(text),
        StoreError::Unreadable { .. } => Status::permission_denied(text),
    }
}

/// The longest list that copies are taken out of, bytes.
const LONGEST: usize = 64 << 20;

/// A list of models without those that are being copied.
pub async fn without_copies(reply: Reply) -> Result<Reply, Error> {
    if !reply.status.is_success() {
        return Ok(reply);
    }
    let Reply { status, mut headers, body } = reply;
    let bytes = body.collect(LONGEST).await?;
    let Some(rest) = without(&bytes) else { return Ok(Reply::full(status, headers, bytes)) };
    headers.remove(http::header::CONTENT_LENGTH);
    Ok(Reply::full(status, headers, rest))
}

/// The list without them; `None` if there are none in it. Everything else stays as it was.
fn without(bytes: &[u8]) -> Option<String> {
    memchr::memmem::find(bytes, ModelName::COPYING.as_bytes())?;
    let mut parts: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(bytes).ok()?;
    let is_copy = |entry: &serde_json::Value| {
        ["name", "model", "id"].iter().any(|key| entry[key].as_str().is_some_and(ModelName::is_unfinished))
    };
    for list in parts.values_mut().filter_map(serde_json::Value::as_array_mut) {
        list.retain(|entry| !is_copy(entry));
    }
    serde_json::to_string(&parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_taken_out_of_lists() {
        let list = r#"{"models":[{"name":"127.0.0.1:4/olol-copy-0/m:latest","size":1},{"name":"m:latest","size":1}]}"#;
        assert_eq!(without(list.as_bytes()).as_deref(), Some(r#"{"models":[{"name":"m:latest","size":1}]}"#));
        assert_eq!(without(br#"{"models":[{"name":"m:latest"}]}"#), None);
    }
}
