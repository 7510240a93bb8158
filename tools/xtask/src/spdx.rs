//! Licence expressions: can this one be met with the licences on a list?
//!
//! The grammar is SPDX's (`OR`, `AND`, `WITH`, parentheses), and the old `MIT/Apache-2.0` for `OR`.

use anyhow::{Result, bail};

/// Whether `expression` is met by licences of `allow` alone.
pub fn allowed(expression: &str, allow: &[String]) -> Result<bool> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut parser = Parser { words: spaced.split_whitespace().peekable(), allow };
    let result = parser.any()?;
    match parser.words.next() {
        None => Ok(result),
        Some(word) => bail!("unexpected {word:?} in licence expression {expression:?}"),
    }
}

struct Parser<'a> {
    words: std::iter::Peekable<std::str::SplitWhitespace<'a>>,
    allow: &'a [String],
}

impl Parser<'_> {
    fn any(&mut self) -> Result<bool> {
        let mut result = self.all()?;
        while self.words.next_if_eq(&"OR").is_some() {
            result |= self.all()?;
        }
        Ok(result)
    }

    fn all(&mut self) -> Result<bool> {
        let mut result = self.one()?;
        while self.words.next_if_eq(&"AND").is_some() {
            result &= self.one()?;
        }
        Ok(result)
    }

    fn one(&mut self) -> Result<bool> {
        match self.words.next() {
            Some("(") => {
                let result = self.any()?;
                match self.words.next() {
                    Some(")") => Ok(result),
                    _ => bail!("a parenthesis is not closed in a licence expression"),
                }
            }
            None | Some(")" | "OR" | "AND" | "WITH") => {
                bail!("a licence is missing in a licence expression")
            }
            Some(name) => {
                let name = match self.words.next_if_eq(&"WITH") {
                    None => name.to_owned(),
                    Some(_) => format!("{name} WITH {}", self.words.next().unwrap_or_default()),
                };
                Ok(self.allow.contains(&name))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::allowed;

    fn check(expression: &str) -> Option<bool> {
        let allow =
            ["MIT", "Apache-2.0", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        allowed(expression, &allow).ok()
    }

    #[test]
    fn one_allowed_choice_is_enough() {
        assert_eq!(check("MIT"), Some(true));
        assert_eq!(check("GPL-2.0-only"), Some(false));
        assert_eq!(check("GPL-2.0-only OR MIT"), Some(true));
        assert_eq!(check("MIT/Apache-2.0"), Some(true));
    }

    #[test]
    fn every_part_of_a_conjunction_counts() {
        assert_eq!(check("MIT AND GPL-2.0-only"), Some(false));
        assert_eq!(check("ISC AND (GPL-2.0-only OR Apache-2.0)"), Some(true));
        assert_eq!(check("(MIT OR ISC) AND Unicode-3.0"), Some(false));
        assert_eq!(check("MIT OR ISC AND GPL-2.0-only"), Some(true), "AND binds tighter than OR");
    }

    #[test]
    fn an_exception_makes_another_licence() {
        assert_eq!(check("Apache-2.0 WITH LLVM-exception"), Some(true));
        assert_eq!(check("MIT WITH LLVM-exception"), Some(false));
    }

    #[test]
    fn nonsense_is_refused() {
        for expression in ["", "MIT OR", "(MIT", "MIT)", "MIT ISC", "AND MIT"] {
            assert_eq!(check(expression), None, "{expression:?}");
        }
    }
}
