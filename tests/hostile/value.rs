//! Values of the case language, and the expressions that make them: a pure function of text and names.
//!
//! `2^64-1`, `END-16`, `NEXT|WRITE`, `"f\0"`, `le32(7)+"x"*256`: numbers and bytes, no spaces outside of quotes and
//! parentheses. `+` joins bytes and `*` repeats them. README.md has the whole list.

use std::fmt;

/// Most bytes that an expression may make: the slip of a finger must not fill memory.
const MOST_BYTES: usize = 64 << 20;

/// What an expression comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Number(i128),
    Bytes(Vec<u8>),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Bytes(bytes) if bytes.len() > 200 => {
                write!(f, "\"{}\" and {} bytes more", bytes[..200].escape_ascii(), bytes.len() - 200)
            }
            Self::Bytes(bytes) => write!(f, "\"{}\"", bytes.escape_ascii()),
        }
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number.into())
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Self::Number(i128::try_from(number).unwrap_or(i128::MAX))
    }
}

impl Value {
    /// The number, or an error that names what it is for.
    pub fn number(&self, what: &str) -> Result<i128, String> {
        match self {
            Self::Number(number) => Ok(*number),
            Self::Bytes(_) => Err(format!("`{what}` is a number, not bytes")),
        }
    }

    /// The bytes, likewise.
    pub fn bytes(&self, what: &str) -> Result<&[u8], String> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Number(_) => Err(format!("`{what}` is bytes, not a number")),
        }
    }

    /// The number in an integer type of the host's.
    pub fn to<T: TryFrom<i128>>(&self, what: &str) -> Result<T, String> {
        let number = self.number(what)?;
        T::try_from(number).map_err(|_| format!("{number} is too large or too small for `{what}`"))
    }
}

/// The `width` low bytes of a number, the least significant first. A negative one is as in two's complement.
pub fn little_endian(number: i128, width: usize, what: &str) -> Result<Vec<u8>, String> {
    let bits = 8 * u32::try_from(width.min(8)).unwrap_or(8);
    let most = 1_i128 << bits;
    if number >= most || number < -(most / 2) {
        return Err(format!("{number} does not fit into the {width} bytes of `{what}`"));
    }
    Ok(number.to_le_bytes()[..width.min(8)].to_vec())
}

/// Where names and calls get their values.
pub trait Names {
    /// What a name stands for.
    fn name(&self, name: &str) -> Option<Value>;
    /// What a function gives that is not one of the language's own.
    fn call(&mut self, function: &str, arguments: &[Value]) -> Result<Value, String>;
}

/// An expression, parsed.
#[derive(Debug, Clone)]
pub enum Expression {
    Literal(Value),
    Name(String),
    Call(String, Vec<Self>),
    Binary(char, Box<Self>, Box<Self>),
}

impl Expression {
    /// Parses all of `text`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parser = Parser { text: text.as_bytes(), at: 0 };
        let expression = parser.sum()?;
        match parser.peek() {
            None => Ok(expression),
            Some(_) => Err(format!("`{text}` is no expression from its byte {} on", parser.at + 1)),
        }
    }

    /// What it comes to.
    pub fn value(&self, names: &mut dyn Names) -> Result<Value, String> {
        match self {
            Self::Literal(value) => Ok(value.clone()),
            Self::Name(name) => names.name(name).ok_or_else(|| format!("`{name}` is not known here")),
            Self::Call(function, arguments) => {
                let values =
                    arguments.iter().map(|argument| argument.value(names)).collect::<Result<Vec<_>, _>>()?;
                match own_function(function, &values) {
                    Some(result) => result,
                    None => names.call(function, &values),
                }
            }
            Self::Binary(operator, left, right) => {
                binary(*operator, &left.value(names)?, &right.value(names)?)
            }
        }
    }
}

fn own_function(function: &str, arguments: &[Value]) -> Option<Result<Value, String>> {
    let width = match function {
        "le8" => 1,
        "le16" => 2,
        "le32" => 4,
        "le64" => 8,
        "len" | "cut" | "num" | "text" => 0,
        _ => return None,
    };
    Some(match (function, arguments) {
        ("len", [value]) => value.bytes("len").map(|bytes| Value::from(bytes.len())),
        ("text", [number]) => {
            number.number("text").map(|number| Value::Bytes(number.to_string().into_bytes()))
        }
        ("cut", [value, from, to]) => value.bytes("cut").and_then(|bytes| {
            let (from, to) = (from.to::<usize>("cut")?, to.to::<usize>("cut")?);
            let part = bytes.get(from..to).ok_or_else(|| format!("there are only {} bytes", bytes.len()))?;
            Ok(Value::Bytes(part.to_vec()))
        }),
        ("num", [value, at, width]) => value.bytes("num").and_then(|bytes| {
            let (at, width) = (at.to::<usize>("num")?, width.to::<usize>("num")?);
            let part = bytes.get(at..at.saturating_add(width)).filter(|part| part.len() <= 8);
            let part = part.ok_or_else(|| format!("there are only {} bytes", bytes.len()))?;
            Ok(Value::Number(part.iter().rev().fold(0, |number, byte| number << 8 | i128::from(*byte))))
        }),
        (_, [number]) if width > 0 => number
            .number(function)
            .and_then(|number| little_endian(number, width, function))
            .map(Value::Bytes),
        _ => Err(format!("`{function}` does not take {} values", arguments.len())),
    })
}

fn binary(operator: char, left: &Value, right: &Value) -> Result<Value, String> {
    let overflow = || format!("`{left}{operator}{right}` is beyond all numbers");
    match (operator, left, right) {
        ('+', Value::Bytes(left), Value::Bytes(right)) => Ok(Value::Bytes([&left[..], right].concat())),
        ('*', Value::Bytes(bytes), Value::Number(count)) => {
            let count = usize::try_from(*count).map_err(|_| overflow())?;
            match bytes.len().checked_mul(count) {
                Some(length) if length <= MOST_BYTES => Ok(Value::Bytes(bytes.repeat(count))),
                _ => Err(overflow()),
            }
        }
        (_, Value::Number(left), Value::Number(right)) => {
            let result = match operator {
                '+' => left.checked_add(*right),
                '-' => left.checked_sub(*right),
                '*' => left.checked_mul(*right),
                '/' => left.checked_div(*right),
                '%' => left.checked_rem(*right),
                '^' => u32::try_from(*right).ok().and_then(|power| left.checked_pow(power)),
                _ => Some(left | right),
            };
            result.map(Value::Number).ok_or_else(overflow)
        }
        _ => Err(format!("`{operator}` does not go between these values")),
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn spaces(&mut self) {
        while self.take(b' ') {}
    }

    fn left_to_right(
        &mut self,
        operators: &[u8],
        operand: fn(&mut Self) -> Result<Expression, String>,
    ) -> Result<Expression, String> {
        let mut left = operand(self)?;
        while let Some(operator) = self.peek().filter(|byte| operators.contains(byte)) {
            self.at += 1;
            left = Expression::Binary(operator.into(), Box::new(left), Box::new(operand(self)?));
        }
        Ok(left)
    }

    fn sum(&mut self) -> Result<Expression, String> {
        self.left_to_right(b"+-|", Self::product)
    }

    fn product(&mut self) -> Result<Expression, String> {
        self.left_to_right(b"*/%", Self::power)
    }

    fn power(&mut self) -> Result<Expression, String> {
        self.left_to_right(b"^", Self::operand)
    }

    fn operand(&mut self) -> Result<Expression, String> {
        match self.peek() {
            Some(b'(') => {
                self.at += 1;
                let inner = self.sum()?;
                if self.take(b')') { Ok(inner) } else { Err("`)` is missing".to_owned()) }
            }
            Some(b'"') => self.string(),
            Some(b'-') => {
                self.at += 1;
                let operand = self.operand()?;
                let zero = Expression::Literal(Value::Number(0));
                Ok(Expression::Binary('-', Box::new(zero), Box::new(operand)))
            }
            Some(byte) if byte.is_ascii_digit() => self.number(),
            Some(byte) if byte.is_ascii_alphabetic() => self.named(),
            _ => Err(format!("a value is missing in `{}`", String::from_utf8_lossy(self.text))),
        }
    }

    fn word(&mut self) -> String {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.')) {
            self.at += 1;
        }
        String::from_utf8_lossy(&self.text[start..self.at]).into_owned()
    }

    fn number(&mut self) -> Result<Expression, String> {
        let word = self.word();
        let (digits, shift) = match word.as_bytes() {
            [digits @ .., b'K'] => (digits.len(), 10),
            [digits @ .., b'M'] => (digits.len(), 20),
            [digits @ .., b'G'] => (digits.len(), 30),
            _ => (word.len(), 0),
        };
        let digits = &word[..digits];
        let parsed = match (digits.strip_prefix("0x"), digits.strip_prefix("0o")) {
            (Some(digits), _) => i128::from_str_radix(digits, 16),
            (_, Some(digits)) => i128::from_str_radix(digits, 8),
            _ => digits.parse(),
        };
        let number = parsed.ok().and_then(|number| number.checked_mul(1 << shift));
        number
            .map(|number| Expression::Literal(Value::Number(number)))
            .ok_or_else(|| format!("`{word}` is no number"))
    }

    fn named(&mut self) -> Result<Expression, String> {
        let word = self.word();
        if !self.take(b'(') {
            return Ok(Expression::Name(word));
        }
        let mut arguments = Vec::new();
        self.spaces();
        while !self.take(b')') {
            arguments.push(self.sum()?);
            self.spaces();
            if !self.take(b',') && self.peek() != Some(b')') {
                return Err(format!("`,` or `)` is missing in `{word}(`"));
            }
            self.spaces();
        }
        Ok(Expression::Call(word, arguments))
    }

    fn string(&mut self) -> Result<Expression, String> {
        self.at += 1;
        let mut bytes = Vec::new();
        loop {
            let unended = || "a string does not end".to_owned();
            let byte = self.peek().ok_or_else(unended)?;
            self.at += 1;
            match byte {
                b'"' => return Ok(Expression::Literal(Value::Bytes(bytes))),
                b'\\' => {
                    let escape = self.peek().ok_or_else(unended)?;
                    self.at += 1;
                    bytes.push(match escape {
                        b'0' => 0,
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'e' => 0x1b,
                        b'\\' | b'"' => escape,
                        b'x' => {
                            let digits = self.text.get(self.at..self.at + 2).ok_or_else(unended)?;
                            self.at += 2;
                            let digits = String::from_utf8_lossy(digits);
                            u8::from_str_radix(&digits, 16)
                                .map_err(|_| format!("`\\x{digits}` is no byte"))?
                        }
                        _ => return Err(format!("`\\{}` is no escape", char::from(escape))),
                    });
                }
                _ => bytes.push(byte),
            }
        }
    }
}
