//! Bodies made with zvariant.

use std::os::fd::OwnedFd;

use bowline::framing::{EncodeError, SendFrameError, SendFrameErrorKind};
use bowline::{PassedDescriptor, UnixTransport};
use serde::{Deserialize, Serialize};
use zvariant::serialized::{Context, Data};
use zvariant::{DynamicType, Endian, Type};

use super::{ByteOrder, DbusAnswer, DbusCaller, DbusContext, DbusHandler, DbusHeader, DbusMessage};

/// A body with its signature and its descriptors, as [`DbusContext::call`] takes them.
///
/// It is made of any value that zvariant serialises; a tuple becomes several values. The
/// descriptors in it (`zvariant::Fd`) are duplicated.
///
/// # Examples
///
/// ```
/// use bowline_peers::dbus::DbusBody;
///
/// let body = DbusBody::of(&("a name", 7_u32))?;
/// assert_eq!((body.signature(), body.bytes().len()), ("su", 16));
/// # Ok::<(), bowline_peers::dbus::zvariant::Error>(())
/// ```
#[derive(Debug)]
pub struct DbusBody {
    signature: String,
    bytes: Vec<u8>,
    descriptors: Vec<PassedDescriptor>,
}

impl DbusBody {
    /// Serialises a value, in the byte order of this machine.
    ///
    /// # Errors
    ///
    /// zvariant cannot serialise it, or a descriptor cannot be duplicated.
    pub fn of<B>(value: &B) -> zvariant::Result<Self>
    where
        B: Serialize + DynamicType + ?Sized,
    {
        let data = zvariant::to_bytes(Context::new_dbus(zvariant::NATIVE_ENDIAN, 0), value)?;
        let descriptors = data.fds().iter().map(|fd| {
            let fd = fd.try_to_owned()?;
            OwnedFd::try_from(fd).map(PassedDescriptor::from)
        });
        Ok(Self {
            signature: value.signature().to_string_no_parens(),
            descriptors: descriptors.collect::<zvariant::Result<_>>()?,
            bytes: data.bytes().to_vec(),
        })
    }

    /// Returns the signature: the types of the values.
    pub fn signature(&self) -> &str {
        &self.signature
    }

    /// Returns the serialised values.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the descriptors that the values refer to.
    pub fn into_descriptors(self) -> Vec<PassedDescriptor> {
        self.descriptors
    }
}

impl DbusMessage<'_> {
    /// Returns the values of the body, with the descriptors that they refer to: pass those
    /// of [`DbusContext::descriptors`]. If the body has no descriptors, use
    /// [`body_as`](Self::body_as).
    pub fn body_with(&self, descriptors: impl IntoIterator<Item = OwnedFd>) -> Data<'_, 'static> {
        let endian = match self.order {
            ByteOrder::Little => Endian::Little,
            ByteOrder::Big => Endian::Big,
        };
        let descriptors = descriptors.into_iter().map(zvariant::OwnedFd::from);
        Data::new_fds(self.body, Context::new_dbus(endian, 0), descriptors)
    }

    /// Whether the body is of this type; a tuple stands for several values.
    pub fn is_of<B: Type>(&self) -> bool {
        B::SIGNATURE.to_string_no_parens() == self.header.signature
    }

    /// Deserialises the body into a value that borrows nothing. It cannot contain
    /// descriptors.
    ///
    /// # Errors
    ///
    /// The body is of another type, or malformed.
    pub fn body_as<B>(&self) -> zvariant::Result<B>
    where
        B: Type + for<'d> Deserialize<'d>,
    {
        self.body_with_as(Vec::new())
    }

    /// Deserialises the body into a value that borrows nothing. Its descriptors are
    /// duplicates of `descriptors`, as `zvariant::OwnedFd`.
    ///
    /// # Errors
    ///
    /// The body is of another type, or malformed, or refers to a descriptor that does not
    /// exist.
    pub fn body_with_as<B>(
        &self,
        descriptors: impl IntoIterator<Item = OwnedFd>,
    ) -> zvariant::Result<B>
    where
        B: Type + for<'d> Deserialize<'d>,
    {
        if !self.is_of::<B>() {
            let wanted = B::SIGNATURE.to_string_no_parens();
            let signature = zvariant::Signature::try_from(self.header.signature)?;
            return Err(zvariant::Error::SignatureMismatch(signature, wanted));
        }
        let data = self.body_with(descriptors);
        data.deserialize().map(|(value, _)| value)
    }
}

impl<T: UnixTransport, H: DbusHandler<T>> DbusContext<'_, '_, T, H> {
    /// Calls a method like [`call`](Self::call), with a body that zvariant makes.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call). Also if zvariant cannot serialise the value.
    pub fn call_with<B>(
        &mut self,
        header: &DbusHeader<'_>,
        body: &B,
        answered: impl FnOnce(&mut H, &mut DbusContext<'_, '_, T, H>, DbusAnswer<'_>) + 'static,
    ) -> Result<(), SendFrameError>
    where
        B: Serialize + DynamicType + ?Sized,
    {
        let body = DbusBody::of(body).map_err(|_| unserialisable())?;
        let header = header.signature(&body.signature);
        self.call(&header, &body.bytes, body.descriptors, answered)
    }

    /// Answers a call like [`reply`](Self::reply), with a body that zvariant makes.
    ///
    /// # Errors
    ///
    /// As [`call_with`](Self::call_with).
    pub fn reply_with<B>(&mut self, to: &DbusCaller, body: &B) -> Result<(), SendFrameError>
    where
        B: Serialize + DynamicType + ?Sized,
    {
        let body = DbusBody::of(body).map_err(|_| unserialisable())?;
        self.reply(to, &body.signature, &body.bytes, body.descriptors)
    }

    /// Sends a message like [`send`](Self::send), with a body that zvariant makes.
    ///
    /// # Errors
    ///
    /// As [`call_with`](Self::call_with).
    pub fn send_with<B>(&mut self, header: &DbusHeader<'_>, body: &B) -> Result<(), SendFrameError>
    where
        B: Serialize + DynamicType + ?Sized,
    {
        let body = DbusBody::of(body).map_err(|_| unserialisable())?;
        let header = header.signature(&body.signature);
        self.send(&header, &body.bytes, body.descriptors).map(drop)
    }
}

fn unserialisable() -> SendFrameError {
    let what = "a body that cannot be serialised";
    SendFrameError {
        kind: SendFrameErrorKind::Encode(EncodeError::Malformed { what }),
        descriptors: Vec::new(),
    }
}
