//! Generates the contract with protox, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    use prost::Message;
    println!("cargo::rerun-if-changed=olol");
    let files = protox::compile(["olol/v1/membership.proto", "olol/v1/server.proto"], ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("olol.v1.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").build_transport(false).compile_fds(files)?;
    Ok(())
}
