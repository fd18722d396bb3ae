//! The decoders of both ends: the host's, of what an agent says, and the agent's, of what a host says.
//!
//! An input is the size of the pieces in which the stream arrives (one byte, 0 for all at once), and the stream.

use kiln_wire::{FrameReader, FromAgent, MAX_FROM_AGENT_BYTES, MAX_PAYLOAD_BYTES, ToAgent, encode_frame};

use crate::driver::{Seen, Target, campaign};
use crate::messages;
use crate::random::Random;

/// What decoding one payload comes to: the payload encoded again, or a number for the error.
type Decode = fn(&[u8]) -> Result<Vec<u8>, u64>;

fn from_agent(payload: &[u8]) -> Result<Vec<u8>, u64> {
    FromAgent::decode(payload).map(|message| message.encode()).map_err(|error| messages::kind_of(&error))
}

fn to_agent(payload: &[u8]) -> Result<Vec<u8>, u64> {
    ToAgent::decode(payload).map(|message| message.encode()).map_err(|error| messages::kind_of(&error))
}

fn run(input: &[u8], seen: &mut Seen, cap: usize, decode: Decode) {
    let Some((&piece, stream)) = input.split_first() else { return };
    let mut reader = FrameReader::new(cap);
    let mut taken = 0;
    for bytes in stream.chunks(if piece == 0 { stream.len().max(1) } else { piece.into() }) {
        reader.push(bytes);
        loop {
            match reader.next() {
                Ok(Some(payload)) => {
                    let tag = u64::from(payload[0]) << 8;
                    // However the stream was cut, the payload is the bytes that were next.
                    assert_eq!(payload, stream[taken + 4..][..payload.len()]);
                    taken += 4 + payload.len();
                    match decode(&payload) {
                        Ok(again) => {
                            assert_eq!(again, payload, "a message has one form");
                            seen.note(tag);
                        }
                        // A tag that means nothing is as good as another.
                        Err(0) => seen.note(1),
                        Err(error) => seen.note(error << 16 | tag | 1),
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(reader.next(), Err(error), "a broken stream stays broken");
                    return seen.note(2 + u64::from(matches!(error, kiln_wire::FrameError::Empty)));
                }
            }
        }
    }
    assert_eq!(reader.pending_bytes(), stream.len() - taken);
}

fn generate(random: &mut Random, input: &mut Vec<u8>, tags: &[u8], sample: fn(&mut Random) -> Vec<u8>) {
    input.push(if random.once_in(4) { random.byte() } else { 0 });
    for _ in 0..=random.below(3) {
        let mut payload = sample(random);
        match random.below(8) {
            // Tags that no sample knows get whatever bytes.
            0 => {
                let length = random.below(40);
                payload = random.bytes(length);
                payload.insert(0, random.pick(tags));
            }
            1 | 2 => random.mutate(&mut payload, b""),
            _ => {}
        }
        input.extend(encode_frame(&payload));
    }
}

/// Where the byte before the stream ends, and each frame.
fn parts(input: &[u8]) -> Vec<usize> {
    let mut ends = vec![input.len().min(1)];
    ends.extend(messages::frame_ends(input.get(1..).unwrap_or_default()).iter().map(|end| end + 1));
    ends
}

/// The tags for which `decode` knows a message.
fn known_tags(decode: Decode) -> Vec<u8> {
    let unknown = |tag: &u8| messages::is_unknown_tag(decode(&[*tag]));
    (0..=255).filter(|tag| !unknown(tag)).collect()
}

/// What was decoded, encoded again and kept beside it; lists of short things cost most.
fn memory_limit(input_bytes: usize) -> usize {
    (64 << 10) + 64 * input_bytes
}

struct ToHost {
    tags: Vec<u8>,
}

impl Target for ToHost {
    const NAME: &'static str = "to_host";

    fn new() -> Self {
        Self { tags: known_tags(from_agent) }
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        parts(input)
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        generate(random, input, &self.tags, |random| messages::from_agent(random).encode());
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        run(input, seen, MAX_FROM_AGENT_BYTES, from_agent);
    }

    fn memory_limit(input_bytes: usize) -> usize {
        memory_limit(input_bytes)
    }
}

struct ToGuest {
    tags: Vec<u8>,
}

impl Target for ToGuest {
    const NAME: &'static str = "to_agent";

    fn new() -> Self {
        Self { tags: known_tags(to_agent) }
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        parts(input)
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        generate(random, input, &self.tags, |random| messages::to_agent(random).encode());
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        run(input, seen, MAX_PAYLOAD_BYTES, to_agent);
    }

    fn memory_limit(input_bytes: usize) -> usize {
        memory_limit(input_bytes)
    }
}

mod to_host {
    #[test]
    fn no_bytes_of_an_agent_break_the_hosts_decoder() {
        super::campaign::<super::ToHost>();
    }
}

mod to_agent {
    #[test]
    fn no_bytes_of_a_host_break_the_agents_decoder() {
        super::campaign::<super::ToGuest>();
    }
}
