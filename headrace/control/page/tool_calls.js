/* Tool calls as people read them: `name(argument = value)`. */

const OPENING = /\{\s*"(?:name|arguments|parameters)"/g;
const MOST_CALLS = 100;
const LONGEST_CALL = 20000;

/** A call of a message in OpenAI's form, or as a model writes it: `name` and `arguments` or `parameters`. */
export function callText(call) {
  const { name, arguments: given, parameters } = call.function ?? call;
  const values = parsed(given ?? parameters) ?? {};
  if (typeof values !== "object") return `${name}(${values})`;
  return `${name}(${Object.entries(values).map(([key, value]) => `${key} = ${JSON.stringify(value)}`).join(", ")})`;
}

/** The calls that stand in the text as JSON objects, as most models write them. */
export function callsIn(text) {
  const calls = [];
  let after = 0;
  for (const { index } of [...text.matchAll(OPENING)].slice(0, MOST_CALLS)) {
    const end = index < after ? -1 : endOfObject(text, index);
    const found = end < 0 ? null : parsed(text.slice(index, end));
    if (typeof found?.name !== "string" || typeof (found.arguments ?? found.parameters) !== "object") continue;
    calls.push(found);
    after = end;
  }
  return calls;
}

function endOfObject(text, start) {
  let depth = 0,
    isQuoted = false;
  for (let i = start; i < Math.min(text.length, start + LONGEST_CALL); i++) {
    const sign = text[i];
    if (isQuoted && sign === "\\") i++;
    else if (sign === '"') isQuoted = !isQuoted;
    else if (!isQuoted && sign === "{") depth++;
    else if (!isQuoted && sign === "}" && --depth === 0) return i + 1;
  }
  return -1;
}

function parsed(value) {
  if (typeof value !== "string") return value;
  try {
    return JSON.parse(value);
  } catch {
    return value;
  }
}
