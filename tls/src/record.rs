//! Finds where records begin and end; pure.

use rustls::{ContentType, InvalidMessage, ProtocolVersion};

/// The length of a record's header: type, version, length.
pub(crate) const HEADER: usize = 5;

/// How much plaintext one record carries at most, in bytes.
pub(crate) const MOST_PLAIN: usize = 16_384;

/// How much longer a sealed record may be than its plaintext, in bytes (RFC 5246, 6.2.3).
/// In TLS 1.3 the limit is 256 (RFC 8446, 5.2), which its session checks.
pub(crate) const MOST_OVERHEAD: usize = 2_048;

/// The header of a record that has arrived completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: ContentType,
    pub(crate) version: ProtocolVersion,
    /// The length of what follows the header.
    pub(crate) length: usize,
}

impl Header {
    /// Returns the length of the record with its header.
    pub(crate) fn whole(self) -> usize {
        HEADER + self.length
    }
}

/// Returns the header of the record at the start of `bytes`, if they hold all of the
/// record.
///
/// Bytes that cannot begin a record are refused at the first byte that shows it. A peer
/// that does not speak TLS may never send more than that.
///
/// # Errors
///
/// `bytes` begin no record.
pub(crate) fn next(bytes: &[u8]) -> Result<Option<Header>, InvalidMessage> {
    let Some((&kind, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    // From change_cipher_spec to application_data.
    if !(20..=23).contains(&kind) {
        return Err(InvalidMessage::InvalidContentType);
    }
    if rest.first().is_some_and(|&major| major != 3) {
        return Err(InvalidMessage::UnknownProtocolVersion);
    }
    let Some(&[major, minor, high, low]) = bytes.get(1..HEADER).and_then(|it| it.first_chunk())
    else {
        return Ok(None);
    };
    let kind = ContentType::from(kind);
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > MOST_PLAIN + MOST_OVERHEAD {
        return Err(InvalidMessage::MessageTooLarge);
    }
    if length == 0 && kind != ContentType::ApplicationData {
        return Err(InvalidMessage::InvalidEmptyPayload);
    }
    if bytes.len() < HEADER + length {
        return Ok(None);
    }
    Ok(Some(Header {
        kind,
        version: ProtocolVersion::from(u16::from_be_bytes([major, minor])),
        length,
    }))
}

/// Whether `bytes` begin with a whole record, or with something that cannot be one.
pub(crate) fn is_decided(bytes: &[u8]) -> bool {
    !matches!(next(bytes), Ok(None))
}

/// Returns where the last record in `bytes` begins. It may be incomplete.
pub(crate) fn last_start(bytes: &[u8]) -> Option<usize> {
    let mut last = None;
    let mut at = 0;
    while at < bytes.len() {
        last = Some(at);
        match next(&bytes[at..]) {
            Ok(Some(header)) => at += header.whole(),
            _ => break,
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, length: usize) -> Vec<u8> {
        let mut record = vec![kind, 3, 3];
        record.extend((length as u16).to_be_bytes());
        record.resize(HEADER + length, 0);
        record
    }

    #[test]
    fn a_record_is_whole_at_its_last_byte() {
        let whole = record(23, 300);
        for cut in 0..whole.len() {
            assert_eq!(next(&whole[..cut]).unwrap(), None, "{cut}");
            assert!(!is_decided(&whole[..cut]));
        }
        let header = next(&whole).unwrap().unwrap();
        assert_eq!(
            (header.kind, header.length),
            (ContentType::ApplicationData, 300)
        );
        assert_eq!(header.whole(), 305);
        assert!(is_decided(&whole));
    }

    #[test]
    fn what_is_no_record_is_known_by_its_first_byte() {
        assert_eq!(next(b"G"), Err(InvalidMessage::InvalidContentType));
        assert_eq!(next(&[19]), Err(InvalidMessage::InvalidContentType));
        assert_eq!(next(&[24]), Err(InvalidMessage::InvalidContentType));
        assert_eq!(next(&[22, 2]), Err(InvalidMessage::UnknownProtocolVersion));
        assert_eq!(next(&[22, 4]), Err(InvalidMessage::UnknownProtocolVersion));
        assert!(is_decided(b"G"));
    }

    #[test]
    fn a_record_is_not_longer_than_it_may_be() {
        let most = MOST_PLAIN + MOST_OVERHEAD;
        assert!(next(&record(23, most)).unwrap().is_some());
        let longer = next(&record(23, most + 1)[..HEADER]);
        assert_eq!(longer, Err(InvalidMessage::MessageTooLarge));
        assert_eq!(
            next(&record(22, 0)),
            Err(InvalidMessage::InvalidEmptyPayload)
        );
        assert!(next(&record(23, 0)).unwrap().is_some());
    }

    #[test]
    fn the_last_record_begins_behind_the_others() {
        assert_eq!(last_start(&[]), None);
        let first = record(23, 10);
        assert_eq!(last_start(&first), Some(0));
        let mut both = first.clone();
        both.push(23);
        assert_eq!(last_start(&both), Some(first.len()));
        assert_eq!(last_start(&first[..3]), Some(0));
    }
}
