/* Elements. Whatever comes from the API goes in as text: there is no way from here to HTML. */

/** A new element; `on…` attributes are listeners, null or false ones are left out, children are elements or text. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Writes only what differs, so that nothing is laid out, or read aloud, again for nothing. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setHidden(element, isHidden) {
  if (element.hidden !== isHidden) element.hidden = isHidden;
}

/**
 * Keeps `parent`'s children in step with `items`, by key: rows stay the same elements and are written in place.
 * `make(item)` gives a new child, `write(child, item)` brings it up to date.
 */
export function keep(parent, items, keyOf, make, write) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = known.get(key);
    known.delete(key);
    if (!child) {
      child = make(item);
      child.dataset.key = key;
    }
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
    write(child, item);
  }
  for (const child of known.values()) child.remove();
}
