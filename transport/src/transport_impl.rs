//! `Transport` in terms of [`FileDescriptor`](crate::FileDescriptor).
//!
//! A blanket implementation is not possible: the trait belongs to another
//! crate. So each layer says this once.

macro_rules! impl_transport {
    (impl<$parameter:ident: $bound:path> $type:ty) => {
        impl<$parameter: $bound> bowline_protocol::Transport for $type {
            #[inline(always)]
            fn write(&mut self, data: &[u8]) -> bowline_protocol::WriteStatus {
                $crate::FileDescriptor::write(self, data)
            }

            fn write_sequence(&mut self, parts: &[&[u8]]) -> bowline_protocol::WriteStatus {
                $crate::FileDescriptor::write_sequence(self, parts)
            }

            fn write_owned(&mut self, data: Vec<u8>) -> bowline_protocol::WriteStatus {
                $crate::FileDescriptor::write_owned(self, data)
            }

            fn unsent_bytes(&self) -> usize {
                $crate::FileDescriptor::core(self).unsent_bytes()
            }

            fn bytes_sent(&self) -> u64 {
                $crate::FileDescriptor::core(self).sent
            }

            fn is_send_buffer_full(&self) -> bool {
                $crate::FileDescriptor::is_send_buffer_full(self)
            }

            fn watermarks(&self) -> bowline_protocol::Watermarks {
                $crate::FileDescriptor::core(self).watermarks()
            }

            fn set_watermarks(&mut self, watermarks: bowline_protocol::Watermarks) {
                $crate::FileDescriptor::core_mut(self).set_watermarks(watermarks);
                $crate::FileDescriptor::limits_changed(self);
            }

            fn register_producer(
                &mut self,
                producer: bowline_protocol::ProducerRef,
                kind: bowline_protocol::ProducerKind,
            ) -> Result<(), bowline_protocol::RegisterProducerError> {
                $crate::FileDescriptor::register_producer(self, producer, kind)
            }

            fn unregister_producer(&mut self) {
                $crate::FileDescriptor::core_mut(self).unregister_producer();
            }

            fn is_producer_paused(&self) -> bool {
                $crate::FileDescriptor::core(self).is_producer_paused()
            }

            fn pause_producing(&mut self) {
                $crate::FileDescriptor::core_mut(self).pause_producing();
            }

            fn resume_producing(&mut self) {
                $crate::FileDescriptor::core_mut(self).resume_producing();
            }

            fn is_reading_paused(&self) -> bool {
                $crate::FileDescriptor::core(self).has($crate::file_descriptor::flag::PAUSED)
            }

            fn hold_reading(&mut self) {
                $crate::FileDescriptor::core_mut(self).hold_reading();
            }

            fn release_reading(&mut self) {
                $crate::FileDescriptor::core_mut(self).release_reading();
            }

            fn is_open_for_reading(&self) -> bool {
                $crate::FileDescriptor::core(self).is_open_for_reading()
            }

            fn set_read_limit(&mut self, limit: Option<std::num::NonZeroUsize>) {
                $crate::FileDescriptor::core_mut(self).set_read_limit(limit);
            }

            fn push_back(&mut self, data: Vec<u8>) {
                $crate::FileDescriptor::core_mut(self).push_back(data);
            }

            fn lose_connection(&mut self) {
                $crate::FileDescriptor::core_mut(self).lose_connection();
            }

            fn lose_connection_within(&mut self, deadline: std::time::Duration) {
                $crate::FileDescriptor::core_mut(self).lose_connection_within(deadline);
            }

            fn set_lingering_close(&mut self, lingering: Option<bowline_protocol::LingeringClose>) {
                $crate::FileDescriptor::core_mut(self).set_lingering_close(lingering);
            }

            fn abort_connection(&mut self) {
                $crate::FileDescriptor::core_mut(self).end(bowline_protocol::CloseReason::Aborted);
            }

            fn lose_write_connection(&mut self) {
                $crate::FileDescriptor::core_mut(self).lose_write_connection();
            }

            fn state(&self) -> bowline_protocol::TransportState {
                $crate::FileDescriptor::core(self).transport_state()
            }

            fn host(&self) -> bowline_protocol::Address {
                $crate::socket::private::Sealed::host(&$crate::FileDescriptor::core(self).socket)
            }

            fn peer(&self) -> bowline_protocol::Address {
                $crate::socket::private::Sealed::peer(&$crate::FileDescriptor::core(self).socket)
            }

            #[inline]
            fn handle(&self) -> bowline_protocol::TransportHandle {
                bowline_reactor::Handle::new($crate::FileDescriptor::core(self).token, |facet| {
                    facet.downcast_mut::<Self>().map(|transport| transport as _)
                })
            }

            fn socket_descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
                let core = $crate::FileDescriptor::core(self);
                core.has_lent.set(true);
                $crate::socket::private::Sealed::source(&core.socket)
            }

            fn as_dyn(&mut self) -> &mut dyn bowline_protocol::Transport {
                self
            }

            fn set_write_log(&mut self, log: Option<bowline_protocol::policies::WriteLog>) {
                $crate::FileDescriptor::core_mut(self).set_write_log(log);
            }

            fn close_unclaimed(&mut self, descriptors: Vec<std::os::fd::OwnedFd>) {
                $crate::FileDescriptor::core_mut(self).close_unclaimed(descriptors);
            }
        }
    };
}
