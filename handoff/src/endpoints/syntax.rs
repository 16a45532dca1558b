//! Endpoint strings as text: kinds, arguments, escapes. Pure.

use std::str::FromStr;

use super::EndpointError;

/// An endpoint string, split into its kind and its arguments.
///
/// The kind is the text before the first colon. Colons separate the arguments. An argument
/// with an equals sign has a name, the text before the first equals sign. The others have a
/// position. A backslash takes the next character literally, and so do square brackets
/// around an IPv6 address. (Twisted: `endpoints._parse`.)
///
/// Each argument is taken once. [`finish`](Self::finish) says whether any is left.
#[derive(Clone, Debug)]
pub struct EndpointArguments {
    text: String,
    kind: Piece,
    positional: Vec<Piece>,
    named: Vec<Named>,
}

/// An argument with its name.
#[derive(Clone, Debug)]
struct Named {
    name: String,
    /// Where the name begins. With escapes, it takes more bytes than it has.
    start: usize,
    piece: Piece,
}

/// One argument, or the kind.
#[derive(Clone, Debug)]
struct Piece {
    value: String,
    start: usize,
    end: usize,
}

/// An argument that was taken, and its place in the string.
#[derive(Clone, Debug)]
pub struct EndpointArgument {
    text: String,
    piece: Piece,
}

/// Quotes a text as one argument of an endpoint string, whatever it contains. (Twisted:
/// `quoteStringArgument`.)
///
/// ```
/// use bowline::endpoint::quote;
///
/// assert_eq!(quote(r"/run/a:b\c"), r"/run/a\:b\\c");
/// ```
pub fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for (index, character) in text.char_indices() {
        let is_special = matches!(character, ':' | '\\' | '=') || (index == 0 && character == '[');
        if is_special {
            quoted.push('\\');
        }
        quoted.push(character);
    }
    quoted
}

/// Collects one piece.
struct Collector {
    value: String,
    start: usize,
    name: Option<String>,
    value_start: usize,
}

impl Collector {
    fn at(start: usize) -> Self {
        Self {
            value: String::new(),
            start,
            name: None,
            value_start: start,
        }
    }

    fn piece(self, end: usize) -> (Option<(String, usize)>, Piece) {
        let piece = Piece {
            value: self.value,
            start: self.value_start,
            end,
        };
        (self.name.map(|name| (name, self.start)), piece)
    }
}

impl EndpointArguments {
    /// Splits a string.
    ///
    /// # Errors
    ///
    /// A name is given twice, a bracket is not closed, or there is a backslash at the end.
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let mut pieces = Vec::new();
        let mut collector = Collector::at(0);
        let mut characters = text.char_indices();
        while let Some((index, character)) = characters.next() {
            let is_kind = pieces.is_empty();
            let is_first = index == collector.value_start;
            match character {
                ':' => {
                    let next = Collector::at(index + 1);
                    pieces.push(std::mem::replace(&mut collector, next).piece(index));
                }
                '=' if !is_kind && collector.name.is_none() => {
                    collector.name = Some(std::mem::take(&mut collector.value));
                    collector.value_start = index + 1;
                }
                '\\' => match characters.next() {
                    Some((_, literal)) => collector.value.push(literal),
                    None => {
                        let what = "the backslash has nothing to escape";
                        return Err(EndpointError::at(text, index, text.len(), what));
                    }
                },
                '[' if is_first && !is_kind => {
                    let Some(length) = text[index..].find(']') else {
                        let what = "the bracket is not closed";
                        return Err(EndpointError::at(text, index, text.len(), what));
                    };
                    let inner = &text[index + 1..index + length];
                    collector.value.push_str(inner);
                    characters = text.char_indices();
                    let after = index + length;
                    while characters.next().is_some_and(|(at, _)| at < after) {}
                }
                literal => collector.value.push(literal),
            }
        }
        pieces.push(collector.piece(text.len()));
        Self::sort(text, pieces)
    }

    fn sort(
        text: &str,
        pieces: Vec<(Option<(String, usize)>, Piece)>,
    ) -> Result<Self, EndpointError> {
        let mut pieces = pieces.into_iter();
        let (_, kind) = pieces.next().unwrap_or_else(|| Collector::at(0).piece(0));
        let mut arguments = Self {
            text: text.to_owned(),
            kind,
            positional: Vec::new(),
            named: Vec::new(),
        };
        for (name, piece) in pieces {
            let Some((name, start)) = name else {
                arguments.positional.push(piece);
                continue;
            };
            if arguments.named.iter().any(|known| known.name == name) {
                let what = format!("{name} is given twice");
                // Up to the equals sign.
                return Err(EndpointError::at(text, start, piece.start - 1, what));
            }
            arguments.named.push(Named { name, start, piece });
        }
        // Taken from the end.
        arguments.positional.reverse();
        Ok(arguments)
    }

    /// Returns the kind, such as `tcp`.
    pub fn kind(&self) -> &str {
        &self.kind.value
    }

    /// Changes the kind. A kind of a program's own uses this to become the kind that it is
    /// based on. The string, and the places of errors in it, stay.
    pub fn set_kind(&mut self, kind: impl Into<String>) {
        self.kind.value = kind.into();
    }

    /// Puts back an argument that was taken, under its name.
    pub fn put_back(&mut self, name: &str, argument: EndpointArgument) {
        let piece = argument.piece;
        self.named.push(Named {
            name: name.to_owned(),
            start: piece.start,
            piece,
        });
    }

    /// Returns the whole string.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Returns how many arguments without a name are left.
    pub fn positional_left(&self) -> usize {
        self.positional.len()
    }

    /// Takes the argument with this name.
    pub fn named(&mut self, name: &str) -> Option<EndpointArgument> {
        let index = self.named.iter().position(|known| known.name == name)?;
        let named = self.named.remove(index);
        Some(self.argument(named.piece))
    }

    /// Takes the first argument that has no name and was not taken yet.
    pub fn positional(&mut self) -> Option<EndpointArgument> {
        let piece = self.positional.pop()?;
        Some(self.argument(piece))
    }

    /// Takes the argument with this name, or else the first one without a name.
    pub fn take(&mut self, name: &str) -> Option<EndpointArgument> {
        self.named(name).or_else(|| self.positional())
    }

    /// As [`take`](Self::take), for an argument that is required.
    ///
    /// # Errors
    ///
    /// The argument is missing.
    pub fn require(&mut self, name: &str) -> Result<EndpointArgument, EndpointError> {
        self.take(name)
            .ok_or_else(|| self.error_at_end(format!("{name} is missing")))
    }

    fn argument(&self, piece: Piece) -> EndpointArgument {
        EndpointArgument {
            text: self.text.clone(),
            piece,
        }
    }

    /// Checks that no argument is left that the kind does not know.
    ///
    /// # Errors
    ///
    /// The error is about the first argument that is left.
    pub fn finish(self) -> Result<(), EndpointError> {
        if let Some(Named { name, start, piece }) = self.named.first() {
            let what = format!("{} has no argument {name}", self.kind.value);
            return Err(EndpointError::at(&self.text, *start, piece.end, what));
        }
        match self.positional.last() {
            None => Ok(()),
            Some(piece) => {
                let what = format!("{} takes fewer arguments", self.kind.value);
                Err(EndpointError::at(&self.text, piece.start, piece.end, what))
            }
        }
    }

    /// Makes an error about the kind.
    pub fn error_at_kind(&self, what: impl Into<String>) -> EndpointError {
        EndpointError::at(&self.text, self.kind.start, self.kind.end, what)
    }

    /// Makes an error about something that is missing.
    pub fn error_at_end(&self, what: impl Into<String>) -> EndpointError {
        let end = self.text.len();
        EndpointError::at(&self.text, end, end, what)
    }
}

impl EndpointArgument {
    /// Returns its text, without escapes.
    pub fn as_str(&self) -> &str {
        &self.piece.value
    }

    /// Parses its text as a value. `is` says what it should be: `"port, which is …"`.
    ///
    /// # Errors
    ///
    /// The text is not such a value. The error has the place of the argument.
    pub fn parse<T: FromStr>(&self, is: &str) -> Result<T, EndpointError> {
        let value = self.piece.value.parse();
        value.map_err(|_| self.error(format!("{:?} is no {is}", self.piece.value)))
    }

    /// Makes an error about it.
    pub fn error(&self, what: impl Into<String>) -> EndpointError {
        EndpointError::at(&self.text, self.piece.start, self.piece.end, what)
    }
}
