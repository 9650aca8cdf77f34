//! Proof that both ends of a connection know the token of the cluster, without showing it.
//!
//! Who calls says Hello with a nonce and the address that it has dialled; the other proves itself first, then the caller. A
//! proof is HMAC-SHA256 under the token over all that matters: what the connection is for, who proves it, both nonces, and
//! that address. An agent that nobody has named proves nothing where it was reached at another address than the one that was
//! dialled: whoever announces an agent and hands all of this on to a true one would be found out by that. Of agents that the
//! operator has named this is not asked, since ports are mapped and addresses translated.
//!
//! Without TLS nothing keeps somebody who sits on the wire between the two from reading along, or from changing what is said
//! after the proof; but there is no token in it that he could use.

use std::net::SocketAddr;

use http_body::Body;
use olol_middleware::BoxError;
use olol_proto::v1::membership_client::MembershipClient;
use olol_proto::v1::{HelloRequest, HelloResponse, ProveRequest};
use ring::hmac;
use tonic::client::GrpcService;
use tonic::{Code, Status};

use super::{Token, Tokens};

/// Bytes of a nonce.
pub const NONCE: usize = 32;
/// The most proofs of the other that are looked at: one for each token of its file, and of the one before.
const MOST_PROOFS: usize = 2 * super::token::MOST;

/// Why an agent proves nothing.
pub const ELSEWHERE: &str = "the agent was not reached at the address that was dialled: somebody stands between who hands all of \
                             it on, or ports are mapped; name it with --servers if that is meant so";

/// A number that is never used again.
pub type Nonce = [u8; NONCE];

/// What a connection is for: no proof for one purpose is any good for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The caller has dialled the agent.
    Call,
    /// The agent has dialled a proxy, which calls it over that connection.
    Join,
}

/// Who proves something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who calls.
    Caller,
    /// The agent.
    Agent,
}

/// All that a proof is about.
#[derive(Clone, Debug)]
pub struct Transcript {
    /// What the connection is for.
    pub purpose: Purpose,
    /// The address that was dialled.
    pub address: String,
    /// Whether the agent must have been reached at that very address.
    pub bound: bool,
    /// The caller's nonce.
    pub caller: Nonce,
    /// The agent's nonce.
    pub agent: Nonce,
}

impl Transcript {
    /// The proof of one side.
    pub fn proof(&self, token: &Token, side: Side) -> Vec<u8> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, token.reveal().as_bytes());
        hmac::sign(&key, &self.text(side)).as_ref().to_vec()
    }

    /// Whether this is the proof of a side. How long that takes tells nothing of it.
    pub fn is_proved(&self, token: &Token, side: Side, shown: &[u8]) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, token.reveal().as_bytes());
        hmac::verify(&key, &self.text(side), shown).is_ok()
    }

    /// What is proved, so that no two things have the same text.
    fn text(&self, side: Side) -> Vec<u8> {
        let mut text = b"olol cluster proof 1\0".to_vec();
        text.push(match self.purpose {
            Purpose::Call => 0,
            Purpose::Join => 1,
        });
        text.push(match side {
            Side::Caller => 0,
            Side::Agent => 1,
        });
        text.push(u8::from(self.bound));
        text.extend_from_slice(&self.caller);
        text.extend_from_slice(&self.agent);
        // The last, so its length needs not be told.
        text.extend_from_slice(self.address.as_bytes());
        text
    }
}

/// A new nonce.
pub fn nonce() -> Result<Nonce, BoxError> {
    let mut nonce = [0; NONCE];
    getrandom::fill(&mut nonce).map_err(|error| format!("the system has no random numbers: {error}"))?;
    Ok(nonce)
}

/// An address as both ends write it: of IPv4 where it is one, and without the name of an interface.
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A connection on which somebody is about to be called.
#[derive(Clone, Copy, Debug)]
pub struct Dialled {
    /// What it is for.
    pub purpose: Purpose,
    /// The address that was dialled.
    pub address: SocketAddr,
    /// Whether the other must have been reached at that very address.
    pub bound: bool,
    /// Whether the other has shown a certificate of the cluster's CA.
    pub is_certified: bool,
}

/// Why the other is not called, or does not answer.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It has not proved that it knows the token.
    #[error("refused: no proof of the cluster token: {0}")]
    Unproved(String),
    /// It does not know us.
    #[error("refuses our token: {0}")]
    Stranger(String),
}

/// Who the other turned out to be.
#[derive(Clone, Debug)]
pub struct Known {
    /// Random id of its process.
    pub instance: String,
}

/// Proves ourselves to an agent that has proved itself to us. Nothing else may be said on the connection before.
pub async fn introduce<T>(
    mut client: MembershipClient<T>,
    dialled: Dialled,
    tokens: Option<&Tokens>,
) -> Result<Known, BoxError>
where
    T: GrpcService<tonic::body::Body, Error: Into<BoxError>> + Send,
    T::ResponseBody: Body<Data = bytes::Bytes, Error: Into<BoxError> + Send> + Send + 'static,
{
    let Dialled { purpose, address, bound, is_certified } = dialled;
    let address = plain(address).to_string();
    let caller = nonce()?;
    let hello = HelloRequest { nonce: caller.to_vec().into(), address: address.clone(), bound };
    let told = client.hello(hello).await.map_err(|status| no_hello(&status))?.into_inner();
    let HelloResponse { nonce: agent, proofs } = told;
    let agent: Nonce =
        agent.as_ref().try_into().map_err(|_| Refused::Unproved("its nonce is not of 32 bytes".to_owned()))?;
    let transcript = Transcript { purpose, address, bound, caller, agent };
    let shared = tokens.and_then(|tokens| shared(&transcript, tokens, &proofs));
    // Also to one that we do not believe: it should not wait, and can say so in its log.
    let proof = shared.map(|token| transcript.proof(&token, Side::Caller));
    let is_proved = proof.is_some();
    let answer = client.prove(ProveRequest { proof: proof.unwrap_or_default().into() }).await;
    if !is_proved && !is_certified {
        return Err(Refused::Unproved(unproved(tokens.is_some())).into());
    }
    match answer {
        Ok(answer) => Ok(Known { instance: answer.into_inner().instance_id }),
        Err(status) if status.code() == Code::Unauthenticated => {
            Err(Refused::Stranger(status.message().to_owned()).into())
        }
        Err(status) => Err(crate::pool::told(&status).into()),
    }
}

/// The token that we share with whoever has made these proofs.
fn shared(transcript: &Transcript, tokens: &Tokens, proofs: &[bytes::Bytes]) -> Option<Token> {
    let proves =
        |token: &&Token| proofs.iter().take(MOST_PROOFS).any(|proof| transcript.is_proved(token, Side::Agent, proof));
    tokens.all().iter().find(proves).cloned()
}

fn unproved(has_token: bool) -> String {
    let why = if has_token { "its token is not ours" } else { "there is no token here to know it by" };
    format!(
        "{why}; give both the same: `olol token` prints it where the agent runs, and OLOL_TOKEN or --token-file give it to the \
         proxy"
    )
}

/// Why an agent has not even begun.
fn no_hello(status: &Status) -> BoxError {
    match status.code() {
        Code::Unimplemented => {
            Refused::Unproved("it knows no such thing: it is a proxy, or an agent of an older OLOL".to_owned()).into()
        }
        // In our own words: nobody knows yet who says it.
        Code::PermissionDenied => Refused::Unproved(ELSEWHERE.to_owned()).into(),
        Code::Unauthenticated => Refused::Stranger(status.message().to_owned()).into(),
        _ => crate::pool::told(status).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript() -> Transcript {
        Transcript {
            purpose: Purpose::Call,
            address: "10.0.0.1:50051".to_owned(),
            bound: true,
            caller: [1; NONCE],
            agent: [2; NONCE],
        }
    }

    #[test]
    fn a_proof_is_good_for_nothing_else() {
        let token = Token::make().unwrap();
        let proof = transcript().proof(&token, Side::Agent);
        assert!(transcript().is_proved(&token, Side::Agent, &proof));
        for other in [
            Transcript { purpose: Purpose::Join, ..transcript() },
            Transcript { address: "10.0.0.2:50051".to_owned(), ..transcript() },
            Transcript { bound: false, ..transcript() },
            Transcript { caller: [2; NONCE], ..transcript() },
            Transcript { agent: [1; NONCE], ..transcript() },
        ] {
            assert!(!other.is_proved(&token, Side::Agent, &proof), "{other:?}");
        }
        assert!(!transcript().is_proved(&token, Side::Caller, &proof));
        assert!(!transcript().is_proved(&Token::make().unwrap(), Side::Agent, &proof));
        for wrong in [&b""[..], &proof[1..], &[proof.clone(), vec![0]].concat()] {
            assert!(!transcript().is_proved(&token, Side::Agent, wrong));
        }
    }

    #[test]
    fn addresses_are_the_same_however_a_socket_tells_them() {
        for (told, same) in
            [("[::ffff:10.0.0.1]:1", "10.0.0.1:1"), ("[fe80::1%3]:1", "[fe80::1]:1"), ("10.0.0.1:1", "10.0.0.1:1")]
        {
            assert_eq!(plain(told.parse().unwrap()).to_string(), same);
        }
    }
}
