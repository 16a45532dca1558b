//! Encodes values as bytes for another process, in memory that is wiped; pure.

use zeroize::Zeroizing;

/// Appends values. Its memory is wiped, also what it had before it grew.
pub(crate) struct Writer {
    bytes: Zeroizing<Vec<u8>>,
}

impl Writer {
    /// Makes one with room for this many bytes.
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self {
            bytes: Zeroizing::new(Vec::with_capacity(bytes)),
        }
    }

    fn put(&mut self, more: &[u8]) {
        let wanted = self.bytes.len() + more.len();
        if wanted > self.bytes.capacity() {
            // A vector that grows leaves a copy behind.
            let mut larger = Zeroizing::new(Vec::with_capacity(2 * wanted));
            larger.extend_from_slice(&self.bytes);
            self.bytes = larger;
        }
        self.bytes.extend_from_slice(more);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.put(&value.to_be_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.put(&value.to_be_bytes());
    }

    /// Appends bytes, preceded by their length.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.put(&(bytes.len() as u32).to_be_bytes());
        self.put(bytes);
    }

    /// Appends bytes, if there are any.
    pub(crate) fn optional(&mut self, bytes: Option<&[u8]>) {
        self.u8(bytes.is_some().into());
        if let Some(bytes) = bytes {
            self.bytes(bytes);
        }
    }

    pub(crate) fn finish(self) -> Zeroizing<Vec<u8>> {
        self.bytes
    }
}

/// The bytes are not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Reads back what a [`Writer`] has written.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or(Malformed)?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.take(1)?[0])
    }

    /// Reads a yes or no.
    pub(crate) fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed),
        }
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let length = u32::from_be_bytes(self.array()?);
        self.take(length as usize)
    }

    pub(crate) fn optional(&mut self) -> Result<Option<&'a [u8]>, Malformed> {
        Ok(match self.flag()? {
            true => Some(self.bytes()?),
            false => None,
        })
    }

    /// Checks that nothing is left.
    pub(crate) fn finish(self) -> Result<(), Malformed> {
        match self.bytes.is_empty() {
            true => Ok(()),
            false => Err(Malformed),
        }
    }

    /// Returns how many bytes are left.
    pub(crate) fn left(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.bytes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for capacity in [0, 3, 1_000] {
            let mut writer = Writer::with_capacity(capacity);
            writer.u8(1);
            writer.u16(0x203);
            writer.u64(u64::MAX - 1);
            writer.bytes(b"some bytes");
            writer.optional(None);
            writer.optional(Some(b"more"));
            let bytes = writer.finish();
            let mut reader = Reader::new(&bytes);
            assert!(reader.flag().unwrap());
            assert_eq!(reader.u16().unwrap(), 0x203);
            assert_eq!(reader.u64().unwrap(), u64::MAX - 1);
            assert_eq!(reader.bytes().unwrap(), b"some bytes");
            assert_eq!(reader.optional().unwrap(), None);
            assert_eq!(reader.optional().unwrap(), Some(&b"more"[..]));
            assert!(reader.is_at_end());
            reader.finish().unwrap();
        }
    }

    #[test]
    fn what_is_cut_or_too_long_is_malformed() {
        let mut writer = Writer::with_capacity(64);
        writer.u64(7);
        writer.bytes(b"bytes");
        let bytes = writer.finish();
        for cut in 0..bytes.len() {
            let mut reader = Reader::new(&bytes[..cut]);
            let read = reader.u64().and_then(|_| reader.bytes());
            assert_eq!(read, Err(Malformed), "cut at {cut}");
        }
        let mut reader = Reader::new(&bytes);
        reader.u64().unwrap();
        assert_eq!(reader.finish(), Err(Malformed));
        assert_eq!(Reader::new(&[2]).flag(), Err(Malformed));
    }
}
