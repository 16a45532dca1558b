//! Checks paths, names and signatures by the specification; pure.

/// How long names and signatures may be, in bytes, by the specification.
pub(super) const LONGEST_NAME: usize = 255;

/// How deep arrays may be nested, and how deep structs.
const DEEPEST: u8 = 32;

/// Whether it is `/`, or elements of letters, digits and underscores, each after a slash.
pub(super) fn is_path(path: &str) -> bool {
    path == "/"
        || path.strip_prefix('/').is_some_and(|path| {
            let is_element = |it: &str| !it.is_empty() && it.bytes().all(is_word);
            path.split('/').all(is_element)
        })
}

/// Whether it is the name of an interface or an error: two elements or more.
pub(super) fn is_interface(name: &str) -> bool {
    name.len() <= LONGEST_NAME && name.contains('.') && name.split('.').all(is_identifier)
}

pub(super) fn is_member(name: &str) -> bool {
    name.len() <= LONGEST_NAME && is_identifier(name)
}

/// Whether it is a unique name (`:1.7`) or a well-known one.
pub(super) fn is_bus_name(name: &str) -> bool {
    let is_element = |element: &str, digit_first: bool| {
        let first = element.bytes().next();
        first.is_some_and(|it| digit_first || !it.is_ascii_digit())
            && element.bytes().all(|it| is_word(it) || it == b'-')
    };
    let (elements, digit_first) = match name.strip_prefix(':') {
        Some(unique) => (unique, true),
        None => (name, false),
    };
    name.len() <= LONGEST_NAME
        && elements.contains('.')
        && elements.split('.').all(|it| is_element(it, digit_first))
}

/// Whether it is any number of complete types.
pub(super) fn is_signature(signature: &[u8]) -> bool {
    if signature.len() > LONGEST_NAME {
        return false;
    }
    let mut rest = signature;
    while !rest.is_empty() {
        match complete_type(rest, 0, 0) {
            Some((_, behind)) => rest = behind,
            None => return false,
        }
    }
    true
}

/// Splits off the first complete type.
pub(super) fn complete_type(signature: &[u8], arrays: u8, structs: u8) -> Option<(&[u8], &[u8])> {
    if arrays > DEEPEST || structs > DEEPEST {
        return None;
    }
    let behind = match signature {
        [code, behind @ ..] if is_basic(*code) || *code == b'v' => behind,
        [b'a', b'{', entry @ ..] => {
            let (key, value) = entry.split_first()?;
            let (_, behind) = complete_type(value, arrays + 1, structs + 1)?;
            match behind {
                [b'}', behind @ ..] if is_basic(*key) => behind,
                _ => return None,
            }
        }
        [b'a', element @ ..] => complete_type(element, arrays + 1, structs)?.1,
        [b'(', fields @ ..] => {
            let mut rest = complete_type(fields, arrays, structs + 1)?.1;
            while rest.first()? != &b')' {
                rest = complete_type(rest, arrays, structs + 1)?.1;
            }
            &rest[1..]
        }
        _ => return None,
    };
    Some(signature.split_at(signature.len() - behind.len()))
}

pub(super) fn is_basic(code: u8) -> bool {
    b"ybnqiuxtdhsog".contains(&code)
}

fn is_identifier(name: &str) -> bool {
    let first = name.bytes().next();
    first.is_some_and(|it| !it.is_ascii_digit()) && name.bytes().all(is_word)
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_specification() {
        for path in ["/", "/a", "/a/_b/C9"] {
            assert!(is_path(path), "{path}");
        }
        for path in ["", "a", "/a/", "//", "/a//b", "/a-b", "/a.b"] {
            assert!(!is_path(path), "{path}");
        }
        for name in ["a.b", "org._7zip.Archive"] {
            assert!(is_interface(name) && is_bus_name(name), "{name}");
        }
        for name in ["", "a", ".a", "a.", "a..b", "a.7", "a b.c"] {
            assert!(!is_interface(name) && !is_bus_name(name), "{name}");
        }
        assert!(is_bus_name(":1.7") && is_bus_name("a-b.c") && !is_bus_name(":17"));
        assert!(!is_interface("a-b.c") && !is_interface(":1.7"));
        assert!(is_member("Get_2") && !is_member("2Get") && !is_member("a.b"));
        assert!(is_member(&"x".repeat(255)) && !is_member(&"x".repeat(256)));
    }

    #[test]
    fn signatures_are_complete_types() {
        for signature in ["", "s", "ah", "a{sv}", "(i(ss))a(yv)", "aaa{oa{sv}}", "vhg"] {
            assert!(is_signature(signature.as_bytes()), "{signature}");
        }
        for signature in [
            "a", "()", "(s", "s)", "{sv}", "a{vs}", "a{s}", "a{ssv}", "z", "r",
        ] {
            assert!(!is_signature(signature.as_bytes()), "{signature}");
        }
        let deep = |count| "a".repeat(count) + "s";
        assert!(is_signature(deep(32).as_bytes()) && !is_signature(deep(33).as_bytes()));
        let nested = |count| "(".repeat(count) + "s" + &")".repeat(count);
        assert!(is_signature(nested(32).as_bytes()) && !is_signature(nested(33).as_bytes()));
    }
}
