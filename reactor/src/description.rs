//! What a descriptor says of itself, for those who look into a running reactor.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

/// What a descriptor says of itself at one moment: a list of sections, each with facts.
///
/// The first section is the descriptor: a connection, a listener, a child. What stands around
/// or inside of it follows, from the outside in: the layers of a transport, the policies
/// around a protocol, and the protocol. See [`Descriptor::describe`].
///
/// Facts are settings, states and counts. What a user of the program has sent is never
/// among them.
///
/// [`Descriptor::describe`]: crate::Descriptor::describe
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Description {
    sections: Vec<Section>,
}

impl Description {
    /// Begins the next section, and answers it. `name` is the kind of a descriptor (`tcp`,
    /// `unix`, `listener`), or the type of what stands around or inside of it.
    pub fn section(&mut self, name: impl Into<Cow<'static, str>>) -> &mut Section {
        self.sections.push(Section {
            name: name.into(),
            facts: Vec::new(),
        });
        self.sections.last_mut().expect("it was pushed")
    }

    /// Begins the next section, called as the type `T` is, without its path and parameters.
    pub fn section_of<T: ?Sized>(&mut self) -> &mut Section {
        let name = std::any::type_name::<T>();
        let name = name.split('<').next().unwrap_or(name);
        self.section(name.rsplit("::").next().unwrap_or(name))
    }

    /// The sections so far, the descriptor itself first.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The fact of that name, from the first section that has one.
    pub fn get(&self, fact: &str) -> Option<&Fact> {
        self.sections.iter().find_map(|section| section.get(fact))
    }

    /// The name of the first section: what kind of descriptor it is.
    pub fn kind(&self) -> &str {
        self.sections.first().map_or("descriptor", Section::name)
    }
}

/// A section of a [`Description`]: a name, and facts in the order in which they were told.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    name: Cow<'static, str>,
    facts: Vec<(Cow<'static, str>, Fact)>,
}

impl Section {
    /// Adds a fact. Names are words in lower case with underscores; one that was told
    /// already is replaced.
    pub fn set(&mut self, name: impl Into<Cow<'static, str>>, fact: impl Into<Fact>) -> &mut Self {
        let (name, fact) = (name.into(), fact.into());
        match self.facts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = fact,
            None => self.facts.push((name, fact)),
        }
        self
    }

    /// Adds a fact, if there is one.
    pub fn set_some(
        &mut self,
        name: impl Into<Cow<'static, str>>,
        fact: Option<impl Into<Fact>>,
    ) -> &mut Self {
        match fact {
            Some(fact) => self.set(name, fact),
            None => self,
        }
    }

    /// What the section is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The fact of that name.
    pub fn get(&self, name: &str) -> Option<&Fact> {
        let mut facts = self.facts.iter();
        facts.find(|(known, _)| known == name).map(|(_, fact)| fact)
    }

    /// All facts with their names.
    pub fn facts(&self) -> impl Iterator<Item = (&str, &Fact)> {
        self.facts.iter().map(|(name, fact)| (&**name, fact))
    }
}

/// One thing that a [`Section`] tells.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Fact {
    /// A number: a count, or a size in bytes where the fact's name says so.
    Count(u64),
    /// Whether something is so.
    Flag(bool),
    /// A time that has passed, or is left, or is a limit.
    Time(Duration),
    /// A word, a name or an address.
    Text(Cow<'static, str>),
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Time(time) => write!(f, "{time:?}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl From<u64> for Fact {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<usize> for Fact {
    fn from(count: usize) -> Self {
        Self::Count(count as u64)
    }
}

impl From<u32> for Fact {
    fn from(count: u32) -> Self {
        Self::Count(count.into())
    }
}

impl From<bool> for Fact {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<Duration> for Fact {
    fn from(time: Duration) -> Self {
        Self::Time(time)
    }
}

impl From<&'static str> for Fact {
    fn from(text: &'static str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Fact {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<Cow<'static, str>> for Fact {
    fn from(text: Cow<'static, str>) -> Self {
        Self::Text(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fact_told_twice_is_the_last_one_and_outer_sections_come_first() {
        let mut description = Description::default();
        assert_eq!(description.kind(), "descriptor");
        description
            .section("tcp")
            .set("sent", 1_u64)
            .set("sent", 2_u64)
            .set_some("peer", None::<String>);
        description
            .section("Chat")
            .set("sent", 3_u64)
            .set("room", "a");
        assert_eq!(description.kind(), "tcp");
        assert_eq!(description.get("sent"), Some(&Fact::Count(2)));
        assert_eq!(description.get("room"), Some(&"a".into()));
        assert_eq!(description.get("peer"), None);
        assert_eq!(description.sections()[0].facts().count(), 1);
    }
}
