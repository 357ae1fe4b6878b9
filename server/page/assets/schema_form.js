// A form made of a JSON schema, so that it has the fields that the server has. A draft holds what was changed, as text.

import { html } from "./html.js";
import { shown, spaced } from "./words.js";

function resolved(schema, root) {
  if (!schema.$ref) return schema;
  const parts = schema.$ref.replace(/^#\//, "").split("/");
  const { $ref, ...beside } = schema;
  return { ...parts.reduce((found, part) => found?.[part], root), ...beside };
}

// What a field takes: its kind, whether it may be empty (null), and its choices.
export function kindOf(schema, root) {
  const found = resolved(schema, root);
  const options = found.anyOf?.map((option) => resolved(option, root));
  const mayBeNull = Boolean(options?.some((option) => option.type === "null"));
  const rest = options?.filter((option) => option.type !== "null");
  const inner = rest?.length === 1 ? rest[0] : rest ? {} : found;
  if (inner.enum) return { kind: "choice", choices: inner.enum, mayBeNull };
  if (["integer", "number", "string", "boolean"].includes(inner.type)) return { kind: inner.type, mayBeNull };
  // such as a power of a norm, or "inf"
  if (rest?.length && rest.every(({ type }) => ["integer", "number", "string"].includes(type))) return { kind: "loose", mayBeNull };
  return { kind: "json", mayBeNull };
}

export function textOf(value, { kind }) {
  if (value === null || value === undefined) return "";
  if (kind === "json") return JSON.stringify(value);
  return String(value);
}

// The value that a text stands for. An Error with words for a text that stands for none.
export function valueOf(text, { kind, mayBeNull }, name) {
  if (text === "" && mayBeNull) return null;
  if (kind === "boolean") return text === "true";
  if (kind === "integer" || kind === "number") {
    const found = Number(text);
    if (text.trim() === "" || Number.isNaN(found)) throw new Error(`${spaced(name)}: a number is needed`);
    return found;
  }
  if (kind === "loose") return text.trim() === "" || Number.isNaN(Number(text)) ? text : Number(text);
  if (kind !== "json") return text;
  try {
    return JSON.parse(text);
  } catch {
    throw new Error(`${spaced(name)}: this is not JSON`);
  }
}

function Control({ id, of, text, isChanged, onText, helpId }) {
  const rest = { id, class: isChanged ? "changed" : "", "aria-describedby": helpId };
  if (of.kind === "boolean") {
    return html`<select ...${rest} value=${text} onChange=${(event) => onText(event.target.value)}>
      <option value="true">yes</option><option value="false">no</option>
    </select>`;
  }
  if (of.kind === "choice") {
    return html`<select ...${rest} value=${text} onChange=${(event) => onText(event.target.value)}>
      ${of.mayBeNull && html`<option value="">none</option>`}
      ${of.choices.map((choice) => html`<option value=${choice}>${choice}</option>`)}
    </select>`;
  }
  const isNumber = of.kind === "integer" || of.kind === "number";
  return html`<input ...${rest} type="text" inputmode=${isNumber ? "decimal" : "text"} spellcheck="false" autocomplete="off"
    placeholder=${of.mayBeNull ? "none" : ""} value=${text} onInput=${(event) => onText(event.target.value)} />`;
}

export function Field({ id, name, of, text, isChanged, onText, help }) {
  return html`<div class=${`field${of.kind === "json" ? " wide" : ""}`}>
    <label for=${id}>${spaced(name)}</label>
    <${Control} id=${id} of=${of} text=${text} isChanged=${isChanged} onText=${onText} helpId=${help ? `${id}-help` : undefined} />
    ${help && html`<span class="help" id=${`${id}-help`}>${help.replaceAll("`", "")}</span>`}
  </div>`;
}

// The fields of `schema`. `values` holds now; `draft` has the texts that were changed.
export function SchemaFields({ prefix, schema, root = schema, values = {}, draft, onDraft, skip = [], mayEdit = true }) {
  const fields = Object.entries(schema.properties ?? {}).filter(([name]) => !skip.includes(name));
  if (!mayEdit) {
    return html`<dl class="plain-values">${fields.map(
      ([name]) => html`<div><dt>${spaced(name)}</dt><dd>${shown(values[name])}</dd></div>`,
    )}</dl>`;
  }
  return html`<div class="fields">${fields.map(([name, field]) => {
    const of = kindOf(field, root);
    const was = textOf(name in values ? values[name] : field.default, of);
    return html`<${Field} key=${name} id=${`${prefix}-${name}`} name=${name} of=${of} help=${field.description}
      text=${draft[name] ?? was} isChanged=${name in draft}
      onText=${(text) => {
        const { [name]: _, ...rest } = draft;
        onDraft(text === was ? rest : { ...rest, [name]: text });
      }} />`;
  })}</div>`;
}

// The changed fields as values. An Error with words for a text that stands for none.
export function changesIn(draft, schema, root = schema) {
  return Object.fromEntries(
    Object.entries(draft).map(([name, text]) => [name, valueOf(text, kindOf(schema.properties[name], root), name)]),
  );
}
