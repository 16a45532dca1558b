//! What a fuzzer, or a test, makes both ends of a session do.

use super::moving::SESSION_BYTES;
use super::*;
use crate::config::crypto_provider;
use crate::encoding::{Reader, Writer};
use crate::layer::state_of_bytes;
use crate::record::{self, HEADER};

/// Runs both ends of a session. The peer has the keys, and sends whatever `data` says:
/// records that are cut, changed, of any type, or none, with moves in between. The first
/// byte chooses the suite, or says that the rest is a connection that a process gives away.
///
/// Checks that what arrives unchanged is what was sealed, and that nothing panics.
pub(crate) fn records(data: &[u8]) {
    let Some((&choice, mut rest)) = data.split_first() else {
        return;
    };
    let provider = crypto_provider();
    if choice >= 0x80 {
        state_of_bytes(&provider, rest);
        return;
    }
    let suites = &provider.cipher_suites;
    let suite = suites[usize::from(choice) % suites.len()];
    let (mut ours, mut theirs) = (session(suite, false), session(suite, true));
    while let &[operation, length, ref behind @ ..] = rest {
        let (piece, behind) = behind.split_at(behind.len().min(length.into()));
        rest = behind;
        let going_on = match operation % 8 {
            0 => open_all(&mut ours, &mut piece.to_vec()).is_ok(),
            1 => {
                ours = moved(suite, ours);
                true
            }
            2 => {
                ours.before_data(1).is_ok()
                    && ours.seal_alert(AlertDescription::CloseNotify).is_ok()
            }
            _ => say(&mut ours, &mut theirs, operation, piece),
        };
        if !going_on {
            return;
        }
    }
}

/// Seals a record at the peer, mostly of a valid type. It arrives unchanged or not.
fn say(ours: &mut Session, theirs: &mut Session, operation: u8, piece: &[u8]) -> bool {
    let kind = match operation % 8 {
        3 => ContentType::Handshake,
        4 => ContentType::Alert,
        5 => ContentType::from(operation),
        _ => ContentType::ApplicationData,
    };
    let update = theirs.before_data(1);
    let Ok(mut sealed) = update.map(Option::unwrap_or_default) else {
        return false;
    };
    let Ok(record) = theirs.seal(kind, OutboundChunks::Single(piece)) else {
        return false;
    };
    let first = sealed.len();
    sealed.extend(record);
    let mut is_changed = operation >= 0xf0;
    if is_changed {
        let place = piece.first().map_or(0, |byte| usize::from(*byte)) % sealed.len();
        sealed[place] ^= 1;
        // The version of a record is to be ignored (RFC 8446, 5.1), and protected by nothing.
        let in_record = if place < first { place } else { place - first };
        is_changed = !(1..3).contains(&in_record);
    }
    match open_all(ours, &mut sealed) {
        Ok(data) => {
            let is_data = kind == ContentType::ApplicationData;
            assert!(!is_changed || data.is_empty(), "changed, and opened");
            assert!(!is_data || is_changed || data == piece, "other data");
            true
        }
        Err(_) => false,
    }
}

fn open_all(session: &mut Session, mut bytes: &mut [u8]) -> Result<Vec<u8>, Failure> {
    let mut data = Vec::new();
    while let Some(header) = record::next(bytes).map_err(Failure::of_framing)? {
        let (record, behind) = bytes.split_at_mut(header.whole());
        let body = &mut record[HEADER..];
        match session.open(header, body)? {
            Opened::Data(place) => data.extend_from_slice(&body[place]),
            Opened::Nothing => {}
            Opened::End => break,
        }
        bytes = behind;
    }
    Ok(data)
}

pub(super) fn moved(suite: SupportedCipherSuite, session: Session) -> Session {
    let mut bytes = Writer::with_capacity(SESSION_BYTES);
    session.into_bytes(&mut bytes).expect("it may move");
    let bytes = bytes.finish();
    let mut reader = Reader::new(&bytes);
    let session = Session::of_bytes(suite, &mut reader).expect("it is one");
    reader.finish().expect("nothing else");
    session
}

/// Makes one of two sessions that have each other's keys.
pub(super) fn session(suite: SupportedCipherSuite, is_client: bool) -> Session {
    let mut bytes = Writer::with_capacity(SESSION_BYTES);
    bytes.u8(is_client.into());
    bytes.u64(0);
    bytes.u64(0);
    let ends = match is_client {
        true => [1, 2],
        false => [2, 1],
    };
    match suite {
        SupportedCipherSuite::Tls13(suite) => {
            let length = suite.common.hash_provider.output_len();
            for end in ends {
                bytes.bytes(&vec![end; length]);
            }
        }
        SupportedCipherSuite::Tls12(suite) => {
            let length = suite.aead_alg.key_block_shape().enc_key_len;
            for end in ends {
                bytes.bytes(&vec![end; length]);
                bytes.bytes(&[end; NONCE_LEN]);
            }
            bytes.u64(1);
        }
    }
    bytes.u8(0);
    bytes.u8(MOST_KEY_UPDATES);
    bytes.u8(MOST_WARNINGS);
    bytes.u8(MOST_RENEGOTIATIONS);
    bytes.u8(MOST_EMPTY);
    bytes.bytes(&[]);
    let bytes = bytes.finish();
    Session::of_bytes(suite, &mut Reader::new(&bytes)).expect("it is one")
}
