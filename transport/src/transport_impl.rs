//! `Transport` and `AnyConnection` in terms of [`Stream`](crate::Stream).
//!
//! A blanket implementation is not possible, since the traits belong to another crate.
//! So each transport invokes this macro once.

macro_rules! impl_transport {
    (impl $(<$parameter:ident: $bound:path>)? for $type:ty) => {
        impl $(<$parameter: $bound>)? bowline_protocol::AnyConnection for $type {
            fn unsent_bytes(&self) -> usize {
                $crate::StreamTransport::stream(self).unsent()
            }

            fn bytes_sent(&self) -> u64 {
                $crate::StreamTransport::stream(self).link.sent
            }

            fn is_send_buffer_full(&self) -> bool {
                $crate::StreamTransport::stream(self).is_full()
            }

            fn pause_producing(&mut self) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .pause_producing();
            }

            fn resume_producing(&mut self) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .resume_producing();
            }

            fn is_reading_paused(&self) -> bool {
                $crate::StreamTransport::stream(self)
                    .link
                    .has($crate::link::Flags::PAUSED)
            }

            fn hold_reading(&mut self) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .hold_reading();
            }

            fn release_reading(&mut self) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .release_reading();
            }

            fn lose_connection(&mut self) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .lose_connection();
            }

            fn lose_connection_within(&mut self, deadline: std::time::Duration) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .lose_connection_within(deadline);
            }

            fn abort_connection(&mut self) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .end(bowline_protocol::CloseReason::Aborted);
            }

            fn lose_write_connection(&mut self) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .lose_write_connection();
            }

            fn state(&self) -> bowline_protocol::TransportState {
                $crate::StreamTransport::stream(self)
                    .link
                    .transport_state()
            }

            fn host(&self) -> bowline_protocol::Address {
                let stream = $crate::StreamTransport::stream(self);
                $crate::FileDescriptor::socket(&stream.layer).host()
            }

            fn peer(&self) -> bowline_protocol::Address {
                let stream = $crate::StreamTransport::stream(self);
                $crate::FileDescriptor::socket(&stream.layer).peer()
            }

            fn socket_descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
                let stream = $crate::StreamTransport::stream(self);
                stream.link.has_lent.set(true);
                $crate::FileDescriptor::socket(&stream.layer).reading()
            }

            fn set_write_observer(
                &mut self,
                observer: Option<std::rc::Rc<dyn bowline_protocol::WriteObserver>>,
            ) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .set_write_observer(observer);
            }

            fn connection_handle(&self) -> bowline_protocol::ConnectionHandle {
                let token = $crate::StreamTransport::stream(self).link.token;
                bowline_reactor::Handle::new(token, |facet| {
                    facet.downcast_mut::<Self>().map(|transport| transport as _)
                })
            }
        }

        impl $(<$parameter: $bound>)? bowline_protocol::Transport for $type {
            #[inline(always)]
            fn write(&mut self, data: &[u8]) -> bowline_protocol::WriteStatus {
                $crate::StreamTransport::stream_mut(self).write_bytes(data)
            }

            fn write_sequence(&mut self, parts: &[&[u8]]) -> bowline_protocol::WriteStatus {
                $crate::StreamTransport::stream_mut(self).write_parts(parts)
            }

            fn write_owned(&mut self, data: Vec<u8>) -> bowline_protocol::WriteStatus {
                $crate::StreamTransport::stream_mut(self).write_vec(data)
            }

            fn when_sent(&mut self, position: u64, then: bowline_protocol::WhenSent) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .await_sent(position, then);
            }

            fn watermarks(&self) -> bowline_protocol::Watermarks {
                $crate::StreamTransport::stream(self).link.watermarks()
            }

            fn set_watermarks(&mut self, watermarks: bowline_protocol::Watermarks) {
                let stream = $crate::StreamTransport::stream_mut(self);
                stream.link.set_watermarks(watermarks);
                stream.limits_changed();
            }

            fn register_producer(
                &mut self,
                producer: bowline_protocol::ProducerRef,
                kind: bowline_protocol::ProducerKind,
            ) -> Result<(), bowline_protocol::RegisterProducerError> {
                $crate::StreamTransport::stream_mut(self).add_producer(producer, kind)
            }

            fn unregister_producer(&mut self) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .unregister_producer();
            }

            fn is_producer_paused(&self) -> bool {
                $crate::StreamTransport::stream(self)
                    .link
                    .is_producer_paused()
            }

            fn is_open_for_reading(&self) -> bool {
                $crate::StreamTransport::stream(self)
                    .link
                    .is_open_for_reading()
            }

            fn set_read_limit(&mut self, limit: Option<std::num::NonZeroUsize>) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .set_read_limit(limit);
            }

            fn push_back(&mut self, data: Vec<u8>) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .push_back(data);
            }

            fn set_lingering_close(&mut self, lingering: Option<bowline_protocol::LingeringClose>) {
                $crate::StreamTransport::stream_mut(self).set_lingering_close(lingering);
            }

            #[inline]
            fn handle(&self) -> bowline_protocol::TransportHandle {
                let token = $crate::StreamTransport::stream(self).link.token;
                bowline_reactor::Handle::new(token, |facet| {
                    facet.downcast_mut::<Self>().map(|transport| transport as _)
                })
            }

            fn as_dyn(&mut self) -> &mut dyn bowline_protocol::Transport {
                self
            }

            fn close_unclaimed(&mut self, descriptors: Vec<std::os::fd::OwnedFd>) {
                $crate::StreamTransport::stream_mut(self)
                    .link
                    .close_unclaimed(descriptors);
            }
        }
    };
}
