//! `olol engine`: the process of the built-in engine. Started by OLOL itself.

use std::path::PathBuf;

use clap::Args;

/// Serve a GGUF file on the socket that is standard input.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The file
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Folder to remove when the parent is gone without having done so
    #[arg(long)]
    folder: PathBuf,
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        crate::engine::run_child(&self.model, &self.folder)
    }
}
