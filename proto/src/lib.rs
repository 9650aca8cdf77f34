//! The wire contract between proxy, agents and programs that speak gRPC, and nothing else.
//!
//! The sources are `olol/v1/*.proto`; their comments are the documentation of the items here.

/// Package `olol.v1`.
pub mod v1 {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated code")]
    tonic::include_proto!("olol.v1");

    /// The compiled contract as an encoded `FileDescriptorSet`, for reflection and for tools.
    pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/olol.v1.bin"));
}
