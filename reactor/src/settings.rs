//! What all settings have in common.

/// Gives a struct of settings, whose fields are public, a method for each that answers
/// it changed.
#[doc(hidden)]
#[macro_export]
macro_rules! setters {
    ($type:ident { $($field:ident: $value:ty),+ $(,)? }) => {
        impl $type {
            $(
                #[doc = concat!(
                    "With another [`", stringify!($field), "`](#structfield.",
                    stringify!($field), ").",
                )]
                #[must_use]
                pub fn $field(mut self, $field: $value) -> Self {
                    self.$field = $field;
                    self
                }
            )+
        }
    };
}
